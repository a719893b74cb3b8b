"""`loquetier bench` and `loquetier bench peers`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import typer

from loquetier.errors import ConfigError

Base = Annotated[str, typer.Option(help="Preset, local directory, GGUF file or hub id.")]
DTypeOption = Annotated[Literal["auto", "float32", "bfloat16"], typer.Option(help="Type of the base's weights.")]
Rounds = Annotated[int, typer.Option(min=1, help="Interleaved rounds; every side is warmed up before the first.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads of every side.")]
Data = Annotated[
    Path | None, typer.Option(help="GSM8K's training file in JSON lines; without it, random words of such lengths.")
]
Training = Annotated[bool, typer.Option(help="Measure fine-tuning and its memory too; PEFT's side takes 4 to 8 GB.")]
Resume = Annotated[bool, typer.Option("--resume", help="Keep the measurements that the output has already.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    group = typer.Typer(invoke_without_command=True, help="Measure speed and memory, side by side, kept as JSON.")
    group.callback()(bench)
    group.command()(peers)
    app.add_typer(group, name="bench")


def bench(
    context: typer.Context,
    base: Base = "smollm2-135m",
    dtype: DTypeOption = "auto",
    rounds: Rounds = 3,
    threads: Threads = 2,
    peer: Annotated[bool, typer.Option(help="Also measure PEFT, in this environment (needs the dev extra).")] = True,
    training: Training = True,
    data: Data = None,
    output: Annotated[Path, typer.Option(help="Where the result goes.")] = Path("bench-output/core.json"),
    resume: Resume = False,
) -> None:
    """Serve, train, and do both, in this process's environment, against PEFT; a table, a JSON file and a picture."""
    if context.invoked_subcommand is not None:
        return
    from loquetier.bench.peers.plan import Plan
    from loquetier.bench.view import bench_command

    if peer and find_spec("peft") is None:
        raise ConfigError("the comparison needs peft: install the dev extra, or run with --no-peer")
    chosen = ("peft",) if peer else ()
    plan = Plan(base=base, dtype=dtype, threads=threads, peers=chosen, servers=False, training=training, data=data)
    bench_command(plan, rounds=rounds, output=output, envs=None, make_envs=False, resume=resume)


def peers(
    base: Base = "smollm2-135m",
    dtype: DTypeOption = "auto",
    rounds: Rounds = 3,
    threads: Threads = 2,
    ours_only: Annotated[bool, typer.Option("--ours-only", help="The same measurements without any peer.")] = False,
    without: Annotated[list[str] | None, typer.Option(help="Leave a peer out: peft or vllm. Repeatable.")] = None,
    make_envs: Annotated[
        bool, typer.Option("--make-envs", help="First make the peers' environments that are missing (minutes, 5 GB).")
    ] = False,
    envs: Annotated[
        Path | None, typer.Option(help="Directory of the peers' environments; by default in the cache.")
    ] = None,
    training: Training = True,
    data: Data = None,
    output: Annotated[Path, typer.Option(help="Where the result goes.")] = Path("bench-output/peers.json"),
    resume: Resume = False,
) -> None:
    """The same against PEFT and vLLM's CPU build, each in an environment of its own; servers are measured too."""
    from loquetier.bench.peers.envs import PEERS, PeerEnvironments, default_directory
    from loquetier.bench.peers.plan import Plan
    from loquetier.bench.view import bench_command

    if unknown := set(without or ()) - set(PEERS):
        raise typer.BadParameter(
            f"{sorted(unknown)[0]!r} is no peer; there are {', '.join(PEERS)}", param_hint="--without"
        )
    chosen = () if ours_only else tuple(p for p in PEERS if p not in (without or ()))
    plan = Plan(base=base, dtype=dtype, threads=threads, peers=chosen, training=training, data=data)
    found = PeerEnvironments((envs or default_directory()).absolute()) if chosen else None
    bench_command(plan, rounds=rounds, output=output, envs=found, make_envs=make_envs, resume=resume)
