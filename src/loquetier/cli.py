"""The command line. Torch is imported inside the commands, so that `loquetier --help` answers at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from loquetier import __version__, cli_adapters, cli_bench, cli_finetune, cli_jobs, cli_serve, cli_validate
from loquetier.errors import LoquetierError

if TYPE_CHECKING:
    from loquetier.config import DType, SamplingParams
    from loquetier.runtime import Runtime

app = typer.Typer(
    name="loquetier",
    help="One frozen base model, many LoRA adapters: answering and training in the same forward pass.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

BaseOption = Annotated[str, typer.Option("--base", help="Preset, local Hugging Face directory, GGUF file or hub id.")]
DTypeOption = Annotated[Literal["auto", "float32", "bfloat16"], typer.Option(help="Type of the served weights.")]
DeviceOption = Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda or cuda:N.")]


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit: 0 done, 1 it failed (one line on stderr), 2 wrong usage, 130 interrupted."""
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        app(args=given, prog_name="loquetier")
    except LoquetierError as error:
        from loquetier.cli_words import command_of, in_words_of

        _fail(error.code, in_words_of(command_of(typer.main.get_command(app), given), str(error)))
    except BrokenPipeError:  # `loquetier generate ... | head`: nobody reads any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        _fail("os_error", str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def _fail(code: str, message: str) -> NoReturn:
    sys.stdout.flush()
    print(f"error [{code}]: {' '.join(message.split())}", file=sys.stderr)
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
    device: DeviceOption = "auto",
) -> None:
    """Answer one prompt, streamed to stdout."""
    from loquetier.config import SamplingParams

    adapters = named_directories(adapter or [])
    if model is None and len(adapters) > 1:
        raise typer.BadParameter(f"say --model NAME: {', '.join(adapters)} are loaded", param_hint="--model")
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    with _runtime(base, dtype, device, adapters) as runtime:
        _stream(runtime, prompt, chat, model or next(iter(adapters), None), params)


def named_directories(options: Sequence[str]) -> dict[str, str]:
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


def _runtime(base: str, dtype: DType, device: str, adapters: dict[str, str]) -> Runtime:
    from loquetier.config import EngineConfig
    from loquetier.runtime import Runtime

    return Runtime(base, adapters=adapters, config=EngineConfig(dtype=dtype, device=device))


def _stream(runtime: Runtime, prompt: str, chat: bool, model: str | None, params: SamplingParams) -> None:
    messages = [{"role": "user", "content": prompt}]
    for event in runtime.stream(messages if chat else prompt, model, params):
        print(event.text, end="", flush=True)
    print()


cli_finetune.register(app)
cli_validate.register(app)
cli_serve.register(app)
cli_jobs.register(app)
cli_adapters.register(app)
cli_bench.register(app)


@app.command()
def doctor() -> None:
    """Say what this machine is, what will run on it and why."""
    from loquetier.doctor import print_report

    print_report()
