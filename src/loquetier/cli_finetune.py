"""`loquetier finetune`: the command and what it says. Which options there are is `cli_options`'s business."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from loquetier.adapters.spec import AdapterSpec, LoraSpec
from loquetier.cli_options import spelled, with_options
from loquetier.config import EngineConfig, TrainingConfig
from loquetier.errors import AdapterExistsError, ConfigError, InsufficientStorageError, LoquetierError

if TYPE_CHECKING:
    from loquetier.finetuning import FinetuneHandle
    from loquetier.runtime import Runtime

_START = "start"
"""Name under which --start-from's adapter is loaded while the job runs, with a suffix if the job has that name."""
_FILES, _CHECKPOINTS, _ADAPTER, _EVALUATION, _ENGINE = "Files", "Checkpoints", "Adapter", "Evaluation", "Engine"


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(name="finetune")(with_options(finetune))


def finetune(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Examples: JSON lines, .json, .csv or .parquet.")],
    name: Annotated[str, typer.Option(help="The adapter's name.")],
    out: Annotated[Path, typer.Option(help="New directory for the adapter (PEFT format).")],
    training: Mapping[str, Any],
    lora: Mapping[str, Any],
    base: Annotated[str, typer.Option(help="Preset, local Hugging Face directory, GGUF file or hub id.")] = (
        "smollm2-135m"
    ),
    start_from: Annotated[
        Path | None, typer.Option(help="Continue from this PEFT directory.", rich_help_panel=_ADAPTER)
    ] = None,
    eval_data: Annotated[
        Path | None, typer.Option(help="Held-out file, same forms.", rich_help_panel=_EVALUATION)
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="Directory for metrics.jsonl and results.csv.", rich_help_panel=_FILES)
    ] = None,
    report_to: Annotated[
        list[str] | None,
        typer.Option(help="tensorboard, wandb, mlflow or trackio; repeatable.", rich_help_panel=_FILES),
    ] = None,
    checkpoint_dir: Annotated[
        Path | None,
        typer.Option(
            help="This job's own directory of checkpoints; a killed run resumes from there.",
            rich_help_panel=_CHECKPOINTS,
        ),
    ] = None,
    checkpoint_every: Annotated[
        int, typer.Option(min=1, help="Steps between two checkpoints.", rich_help_panel=_CHECKPOINTS)
    ] = 50,
    checkpoints_to_keep: Annotated[
        int, typer.Option(min=1, help="Newest checkpoints that stay.", rich_help_panel=_CHECKPOINTS)
    ] = 2,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on from the newest checkpoint, bit for bit; same data and options.",
            rich_help_panel=_CHECKPOINTS,
        ),
    ] = False,
    keep_versions: Annotated[
        int, typer.Option(min=0, help="Older versions that stay in memory.", rich_help_panel=_ENGINE)
    ] = 0,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        typer.Option(help="Type of the served weights.", rich_help_panel=_ENGINE),
    ] = "auto",
    device: Annotated[
        str, typer.Option(help="auto (a GPU if there is one), cpu, cuda or cuda:N.", rich_help_panel=_ENGINE)
    ] = "auto",
    adapter_memory: Annotated[
        int | None, typer.Option(help="Bytes for adapters, in training and served.", rich_help_panel=_ENGINE)
    ] = None,
    train_memory: Annotated[
        int | None, typer.Option(help="Bytes for training beside its adapter.", rich_help_panel=_ENGINE)
    ] = None,
    tape: Annotated[
        Literal["auto", "graph", "replay"],
        typer.Option(help="What a training forward keeps; replay takes less memory.", rich_help_panel=_ENGINE),
    ] = "auto",
) -> None:
    """Train an adapter on a file and write it as a PEFT directory. Ctrl-C keeps what is there, or its checkpoints."""
    if training.get("max_steps") is not None and "num_epochs" in training:
        raise typer.BadParameter("give either --max-steps or --num-epochs, not both", param_hint="--max-steps")
    if resume and checkpoint_dir is None:
        raise typer.BadParameter("needs --checkpoint-dir", param_hint="--resume")
    config, spec = TrainingConfig(**training), _lora_spec(lora, start_from)
    config.check_checkpoints(checkpoint_dir)
    _check_evaluation(config, eval_data)
    records, eval_records = _check_before_training(name, data, eval_data, out)
    from loquetier.runtime import Runtime

    engine = EngineConfig(
        device=device,
        dtype=dtype,
        keep_versions=keep_versions,
        adapter_memory=adapter_memory,
        train_memory=train_memory,
        tape=tape,
    )
    with Runtime(base, config=engine) as runtime:
        start = None
        if start_from is not None:
            start, spec = _load_start(runtime, name, start_from)
        handle = runtime.finetune(
            name,
            records,
            spec=spec,
            training=config,
            eval_data=eval_records,
            start_from=start,
            output_dir=output_dir,
            report_to=report_to or (),
            checkpoint_dir=checkpoint_dir,
            checkpoint_every=checkpoint_every,
            checkpoints_to_keep=checkpoints_to_keep,
            resume=resume,
        )
        _tell_resumed(handle, resume)
        _tell_memory(handle)
        _check_room_for_result(handle, out)
        _train(runtime, handle, out, eval_records, checkpoint_dir)


def _lora_spec(given: Mapping[str, Any], start_from: Path | None) -> AdapterSpec | None:
    """The spec that the options ask for; None = that of the adapter to continue from."""
    if start_from is None:
        return LoraSpec(**given)
    if given:
        flags = ", ".join(map(spelled, given))
        raise typer.BadParameter(f"the adapter brings its own settings; leave out {flags}", param_hint="--start-from")
    return None


def _check_evaluation(config: TrainingConfig, eval_data: Path | None) -> None:
    wanting = config.evaluation_users or ((("eval_every", config.eval_every),) if config.eval_every else ())
    if wanting and eval_data is None:
        name, value = wanting[0]
        raise ConfigError(f"{name}={value}: there is nothing to evaluate on; give --eval-data FILE")


def _check_before_training(
    name: str, data: Path, eval_data: Path | None, out: Path
) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Read the data and make sure that the result can be written: nothing may fail after an hour of training."""
    from loquetier.adapters.registry import check_name
    from loquetier.training.files import read_records

    check_name(name)
    if os.path.lexists(out):
        raise AdapterExistsError(f"{str(out)!r} exists; choose another --out, or remove it first")
    place = next(parent for parent in out.absolute().parents if parent.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"--out {str(out)!r} cannot be written: {str(place)!r} is not a writable directory")
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        # Permission bits are not the whole truth (root, read-only or virtual file systems): try it.
        Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.absolute().parent)).rmdir()
    except OSError as error:
        raise ConfigError(f"--out {str(out)!r} cannot be written: {error.strerror}") from error
    return read_records(data), None if eval_data is None else read_records(eval_data)


def _load_start(runtime: Runtime, name: str, directory: Path) -> tuple[str, AdapterSpec]:
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


def _tell_memory(handle: FinetuneHandle) -> None:
    if handle.estimate is not None:
        print(f"memory, by estimate:\n{handle.estimate.table()}", file=sys.stderr)
    if handle.position is not None:
        print(f"queued: {handle.reason}", file=sys.stderr)


def _check_room_for_result(handle: FinetuneHandle, out: Path) -> None:
    """Raises InsufficientStorageError, and cancels the job, when the disk cannot hold its adapter now."""
    from loquetier.storage import check_room

    if handle.estimate is not None:
        try:
            check_room(out.absolute().parent, handle.estimate.slot, f"the weights of {handle.name!r}", "lower r")
        except LoquetierError:
            handle.cancel()
            raise


def _train(
    runtime: Runtime,
    handle: FinetuneHandle,
    out: Path,
    eval_records: list[dict[str, Any]] | None,
    checkpoint_dir: Path | None,
) -> None:
    """Show progress until the job ends, then write what it published last and say what came out."""
    interrupted = _show_progress(handle)
    failure: LoquetierError | None = None
    try:
        handle.wait()
    except LoquetierError as error:
        failure = error
    if interrupted and checkpoint_dir is not None and not handle.checkpoint_errors:
        # Without --out the very same line can go on.
        print(
            f"interrupted after step {len(handle.history)}: go on from {checkpoint_dir} with --resume", file=sys.stderr
        )
        raise typer.Exit(130)
    if not any(info.name == handle.name for info in runtime.adapters()):
        if failure is not None:
            raise failure
        print("interrupted before anything was published: there is nothing to write", file=sys.stderr)
        raise typer.Exit(130)
    digest = _export(runtime, handle.name, out)
    if interrupted or failure is not None:
        print(f"The training did not finish after step {len(handle.history)}: {out} holds what was published last.")
    for problem in handle.checkpoint_errors:
        print(f"a checkpoint could not be written: {problem}", file=sys.stderr)
    for problem in (*handle.file_errors, *handle.callback_errors):
        print(f"a report could not be written: {problem}", file=sys.stderr)
    if handle.reason is not None:
        print(f"ended after step {len(handle.history)}: {handle.reason}")
    _print_history(handle)
    if eval_records is not None and failure is None:
        result = runtime.evaluate(handle.name, eval_records, max_seq_len=handle.job.config.max_seq_len)
        print(f"held-out: loss {result.loss:.4f}, token accuracy {result.accuracy:.1%}, {result.num_tokens} tokens")
    print(f"written to {out} (digest of the weights {digest})")
    if failure is not None:
        raise failure
    if interrupted:
        raise typer.Exit(130)


def _export(runtime: Runtime, name: str, out: Path) -> str:
    """Write the adapter; while the disk is full what was trained waits in memory, until there is room or Ctrl-C."""
    from loquetier.storage import FIRST_WAIT, LONGEST_WAIT

    wait = FIRST_WAIT
    while True:
        try:
            return runtime.export_adapter(name, out)
        except InsufficientStorageError as error:
            print(f"{error}. Trying again in {wait:g} s; Ctrl-C gives up what was trained", file=sys.stderr)
            before = signal.signal(signal.SIGINT, signal.default_int_handler)  # the way out, while nothing is written
            try:
                time.sleep(wait)
            except KeyboardInterrupt:
                raise error from None
            finally:
                signal.signal(signal.SIGINT, before)
            wait = min(2 * wait, LONGEST_WAIT)


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
