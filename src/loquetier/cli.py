"""The command line. Torch is imported inside the commands, so that `loquetier --help` answers at once."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from loquetier import __version__, cli_validate
from loquetier.errors import AdapterExistsError, ConfigError, LoquetierError

if TYPE_CHECKING:
    from loquetier.adapters.spec import LoraSpec
    from loquetier.config import DType, SamplingParams
    from loquetier.finetuning import FinetuneHandle
    from loquetier.runtime import Runtime

app = typer.Typer(
    name="loquetier",
    help="One frozen base model, many LoRA adapters: answering and training in the same forward pass.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_LATER: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True}
_START = "start"
"""Name under which --start-from's adapter is loaded while the job runs, with a suffix if the job has that name."""

BaseOption = Annotated[str, typer.Option("--base", help="Preset, local Hugging Face directory, GGUF file or hub id.")]
DTypeOption = Annotated[Literal["auto", "float32", "bfloat16"], typer.Option(help="Type of the served weights.")]


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit: 0 done, 1 it failed (one line on stderr), 2 wrong usage, 130 interrupted."""
    try:
        app(args=None if argv is None else list(argv), prog_name="loquetier")
    except LoquetierError as error:
        _fail(error.code, error)
    except BrokenPipeError:  # `loquetier generate ... | head`: nobody reads any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        _fail("os_error", error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def _fail(code: str, error: Exception) -> NoReturn:
    sys.stdout.flush()
    print(f"error [{code}]: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(1)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"loquetier {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    del version


@app.command()
def demo(
    seconds: Annotated[float | None, typer.Option(min=1, help="End the training after this time.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 50,
    output: Annotated[Path, typer.Option(help="Where summary.json and demo.png go.")] = Path("demo-output"),
    dtype: DTypeOption = "auto",
) -> None:
    """Three adapters answer while a fourth is trained, live, on smollm2-135m (2 to 4 minutes on two cores)."""
    from loquetier.demo.run import DemoOptions, run_demo

    run_demo(DemoOptions(steps=steps, seconds=seconds, output=output, dtype=dtype))


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to answer.")],
    base: BaseOption = "smollm2-135m",
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", metavar="NAME=DIR", help="Load a PEFT directory; repeatable.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Who answers: an adapter's name or the base's. With one --adapter: that one.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of the answer.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 = always the most likely token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Smallest set of tokens with this probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Only the k most likely tokens; 0 = all.")] = 0,
    seed: Annotated[int | None, typer.Option(help="Same seed, same answer.")] = None,
    chat: Annotated[bool, typer.Option("--chat/--raw", help="Through the chat template, or the bare text.")] = True,
    dtype: DTypeOption = "auto",
) -> None:
    """Answer one prompt, streamed to stdout."""
    from loquetier.config import SamplingParams

    adapters = _named_directories(adapter or [])
    if model is None and len(adapters) > 1:
        raise typer.BadParameter(f"say --model NAME: {', '.join(adapters)} are loaded", param_hint="--model")
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    with _runtime(base, dtype, adapters) as runtime:
        _stream(runtime, prompt, chat, model or next(iter(adapters), None), params)


def _named_directories(options: Sequence[str]) -> dict[str, str]:
    """NAME=DIR options as a mapping."""
    found: dict[str, str] = {}
    for option in options:
        name, equals, directory = option.partition("=")
        if not (name and equals and directory):
            raise typer.BadParameter(f"{option!r} is not NAME=DIR", param_hint="--adapter")
        if name in found:
            raise typer.BadParameter(f"{name!r} is named twice", param_hint="--adapter")
        found[name] = directory
    return found


def _runtime(base: str, dtype: DType, adapters: dict[str, str]) -> Runtime:
    from loquetier.config import EngineConfig
    from loquetier.runtime import Runtime

    return Runtime(base, adapters=adapters, config=EngineConfig(dtype=dtype))


def _stream(runtime: Runtime, prompt: str, chat: bool, model: str | None, params: SamplingParams) -> None:
    messages = [{"role": "user", "content": prompt}]
    for event in runtime.stream(messages if chat else prompt, model, params):
        print(event.text, end="", flush=True)
    print()


@app.command()
def finetune(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Examples: JSON lines, .json, .csv or .parquet.")],
    name: Annotated[str, typer.Option(help="The adapter's name.")],
    out: Annotated[Path, typer.Option(help="New directory for the adapter (PEFT format).")],
    base: BaseOption = "smollm2-135m",
    r: Annotated[int | None, typer.Option("--r", help="Rank; default 8.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Scale is alpha/r; default 16.")] = None,
    target_modules: Annotated[
        str | None, typer.Option(help="all-linear (default), or names with commas: q_proj,v_proj.")
    ] = None,
    use_rslora: Annotated[bool, typer.Option("--use-rslora", help="Scale by alpha/sqrt(r).")] = False,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-4,
    epochs: Annotated[int, typer.Option(help="Passes over the data.")] = 1,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps, instead of --epochs.")] = None,
    batch_size: Annotated[int, typer.Option(help="Examples per micro-batch.")] = 8,
    gradient_accumulation_steps: Annotated[int, typer.Option(help="Micro-batches per step.")] = 1,
    max_seq_len: Annotated[int, typer.Option(help="Longer examples are cut.")] = 1024,
    lr_scheduler: Annotated[Literal["constant", "linear", "cosine"], typer.Option()] = "constant",
    warmup_ratio: Annotated[float, typer.Option(help="Part of the steps that warm up.")] = 0.0,
    weight_decay: Annotated[float, typer.Option()] = 0.0,
    max_grad_norm: Annotated[float, typer.Option(help="Clip the gradient; 0 = never.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Weights and data order.")] = 0,
    shuffle: Annotated[bool, typer.Option("--shuffle/--no-shuffle", help="A new order each epoch.")] = True,
    eval_data: Annotated[Path | None, typer.Option(help="Held-out file, same forms.")] = None,
    eval_every: Annotated[int, typer.Option(help="Steps between evaluations; 0 = only at the end.")] = 0,
    start_from: Annotated[Path | None, typer.Option(help="Continue from this PEFT directory.")] = None,
    checkpoint_dir: Annotated[
        Path | None, typer.Option(help="This job's own directory of checkpoints; a killed run resumes from there.")
    ] = None,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps between two checkpoints.")] = 50,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint, bit for bit; same data and options.")
    ] = False,
    dtype: DTypeOption = "auto",
) -> None:
    """Train an adapter on a file and write it as a PEFT directory. Ctrl-C keeps what is trained so far."""
    from loquetier.config import TrainingConfig

    if resume and checkpoint_dir is None:
        raise typer.BadParameter("needs --checkpoint-dir", param_hint="--resume")
    spec = _lora_spec(r, alpha, target_modules, use_rslora, start_from)
    training = TrainingConfig(
        learning_rate=learning_rate,
        lr_scheduler_type=lr_scheduler,
        warmup_ratio=warmup_ratio,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        max_seq_len=max_seq_len,
        num_epochs=epochs,
        max_steps=max_steps,
        shuffle=shuffle,
        seed=seed,
        eval_every=eval_every,
    )
    records, eval_records = _check_before_training(name, data, eval_data, eval_every, out)
    with _runtime(base, dtype, {}) as runtime:
        start = None
        if start_from is not None:
            start, spec = _load_start(runtime, name, start_from)
        handle = runtime.finetune(
            name,
            records,
            lora=spec,
            training=training,
            eval_data=eval_records,
            start_from=start,
            checkpoint_dir=checkpoint_dir,
            checkpoint_every=checkpoint_every,
            resume=resume,
        )
        _tell_resumed(handle, resume)
        _train(runtime, handle, out, eval_records)


def _lora_spec(
    r: int | None, alpha: float | None, target_modules: str | None, use_rslora: bool, start_from: Path | None
) -> LoraSpec | None:
    """The spec that the options ask for; None = that of the adapter to continue from."""
    from loquetier.adapters.spec import ALL_LINEAR, LoraSpec

    if start_from is not None:
        if r is not None or alpha is not None or target_modules is not None or use_rslora:
            raise typer.BadParameter("the adapter brings its own r, alpha and targets", param_hint="--start-from")
        return None
    names = target_modules or ALL_LINEAR
    targets = names if names.lower() == ALL_LINEAR else tuple(part.strip() for part in names.split(","))
    return LoraSpec(
        r=8 if r is None else r, alpha=16 if alpha is None else alpha, target_modules=targets, use_rslora=use_rslora
    )


def _check_before_training(
    name: str, data: Path, eval_data: Path | None, eval_every: int, out: Path
) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Read the data and make sure that the result can be written: nothing may fail after an hour of training."""
    from loquetier.adapters.registry import check_name
    from loquetier.training.files import read_records

    check_name(name)
    if eval_every and eval_data is None:
        raise ConfigError(f"eval_every={eval_every}: there is nothing to evaluate on; give --eval-data FILE")
    if os.path.lexists(out):
        raise AdapterExistsError(f"{str(out)!r} exists; choose another --out, or remove it first")
    place = next(parent for parent in out.absolute().parents if parent.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"--out {str(out)!r} cannot be written: {str(place)!r} is not a writable directory")
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {str(out)!r} cannot be written: {error.strerror}") from error
    return read_records(data), None if eval_data is None else read_records(eval_data)


def _load_start(runtime: Runtime, name: str, directory: Path) -> tuple[str, LoraSpec]:
    """Load the adapter to continue from; its name, and its spec as a job can use it."""
    info = runtime.load_adapter(_START if name != _START else f"{_START}-0", directory)
    return info.name, info.spec


def _tell_resumed(handle: FinetuneHandle, asked: bool) -> None:
    if handle.resumed is None:
        if asked:
            print("no checkpoint yet: starting at step 1", file=sys.stderr)
        return
    for reason in handle.resumed.skipped:
        print(f"set aside: {reason}", file=sys.stderr)
    for difference in handle.resumed.differences:
        print(f"not bit for bit as without a break: {difference}", file=sys.stderr)
    print(f"resumed after step {handle.resumed.step} from {handle.resumed.path}", file=sys.stderr)


def _train(runtime: Runtime, handle: FinetuneHandle, out: Path, eval_records: list[dict[str, Any]] | None) -> None:
    """Show progress until the job ends, then write what it published last and say what came out."""
    interrupted = _show_progress(handle)
    failure: LoquetierError | None = None
    try:
        handle.wait()
    except LoquetierError as error:
        failure = error
    if not any(info.name == handle.name for info in runtime.adapters()):
        if failure is not None:
            raise failure
        print("interrupted before the first step was done: there is nothing to write", file=sys.stderr)
        raise typer.Exit(130)
    digest = runtime.export_adapter(handle.name, out)
    if interrupted or failure is not None:
        print(f"The training did not finish: {out} holds the last published version, of step {len(handle.history)}.")
    for problem in handle.checkpoint_errors:
        print(f"a checkpoint could not be written: {problem}", file=sys.stderr)
    _print_history(handle)
    if eval_records is not None and failure is None:
        result = runtime.evaluate(handle.name, eval_records, max_seq_len=handle.job.config.max_seq_len)
        print(f"held-out: loss {result.loss:.4f}, token accuracy {result.accuracy:.1%}, {result.num_tokens} tokens")
    print(f"written to {out} (sha256 {digest})")
    if failure is not None:
        raise failure
    if interrupted:
        raise typer.Exit(130)


def _print_history(handle: FinetuneHandle) -> None:
    history = handle.history
    tokens, seconds = sum(step.num_tokens for step in history), sum(step.seconds for step in history)
    print(
        f"{handle.name}: {len(history)} of {handle.total_steps} steps, loss {history[0].loss:.4f} -> "
        f"{history[-1].loss:.4f}, {tokens} tokens in {seconds:.1f} s ({tokens / seconds:.0f} tokens/s)"
    )


def _show_progress(handle: FinetuneHandle) -> bool:
    """A progress bar until the job ends. True when Ctrl-C ended it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from loquetier.finetuning import poll_steps
    from loquetier.training.job import JobStatus

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[now]}"), console=Console(stderr=True)) as bar:
        task = bar.add_task(handle.name, total=handle.total_steps, now="")
        try:
            for step in poll_steps(handle):
                now = f"loss {step.loss:.4f}  {step.num_tokens / step.seconds:.0f} tokens/s"
                if step.evaluation is not None:
                    now += f"  held-out {step.evaluation.loss:.4f}"
                bar.update(task, completed=step.step, now=now)
        except KeyboardInterrupt:
            # A second Ctrl-C must not lose what the first one wants to keep.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            bar.console.print("interrupted: finishing, then writing what is trained so far")
            if not handle.status.is_final:
                handle.cancel()
            return handle.status is JobStatus.CANCELLED
    return False


cli_validate.register(app)


@app.command()
def doctor() -> None:
    """Say what this machine is, what will run on it and why."""
    from loquetier.doctor import print_report

    print_report()


@app.command(context_settings=_LATER)
def serve() -> None:
    """Not in this version: the HTTP server. Use the Python API or `loquetier generate`."""
    _not_yet("serve", "use the Python API (loquetier.Runtime) or `loquetier generate`")


@app.command()
def bench(
    base: Annotated[str, typer.Option(help="Preset, local directory, GGUF file or hub id.")] = "smollm2-135m",
    dtype: DTypeOption = "auto",
    rounds: Annotated[int, typer.Option(min=1, help="Counted rounds; one warm-up round comes first.")] = 5,
    peer: Annotated[bool, typer.Option(help="Also measure PEFT, in turn with us (needs the dev extra).")] = True,
    output: Annotated[Path, typer.Option(help="Where the result goes.")] = Path("bench-output/core.json"),
) -> None:
    """Serve, train, and do both, against PEFT on the same work; medians and ratios, kept as JSON."""
    from loquetier.bench.view import bench_command

    bench_command(base, dtype=dtype, rounds=rounds, with_peer=peer, output=output)


def _not_yet(command: str, instead: str) -> NoReturn:
    print(f"`loquetier {command}` is not in version {__version__}; {instead}", file=sys.stderr)
    raise typer.Exit(2)
