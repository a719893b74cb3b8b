"""`loquetier serve BASE`."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from loquetier.config import EngineConfig
from loquetier.errors import ConfigError

if TYPE_CHECKING:
    from loquetier.server.auth import KeyRing
    from loquetier.server.services import Services
    from loquetier.server.settings import ServerSettings

PACKAGES = (
    "fastapi",
    "uvicorn",
    "pydantic",
    "msgspec",
    "prometheus_client",
    "structlog",
    "python_multipart",
    "llguidance",
)


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(name="serve")(serve)


def serve(
    base: Annotated[str, typer.Argument(help="Preset, local Hugging Face directory, GGUF file or hub id.")],
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", metavar="NAME=DIR", help="Serve a PEFT directory; repeatable.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8000,
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], typer.Option(help="Type of the served weights.")] = "auto",
    adapter_dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        typer.Option(help="Type of adapters' weights; bfloat16 serves many adapters faster."),
    ] = "auto",
    serve_only: Annotated[
        bool, typer.Option("--serve-only", help="Never train here: the base's weights take half the memory on a CPU.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda or cuda:N.")] = "auto",
    async_scheduling: Annotated[
        bool | None, typer.Option(help="Plan a step while the device computes the one before; by default on a GPU.")
    ] = None,
    slo_ttft: Annotated[
        float | None, typer.Option(help="Seconds to the first token: while one waits longer, new requests get a 503.")
    ] = None,
    slo_tpot: Annotated[
        float | None, typer.Option(help="Seconds per further token: bounds what training adds to a step.")
    ] = None,
    stream_interval: Annotated[
        float | None, typer.Option(help="Seconds between two pieces of a stream; 0: each token at once. Else by load.")
    ] = None,
    kv_memory: Annotated[int | None, typer.Option(help="Bytes for the KV cache.")] = None,
    adapter_memory: Annotated[int | None, typer.Option(help="Bytes for adapter weights.")] = None,
    train_memory: Annotated[int | None, typer.Option(help="Bytes for jobs' state and the open tape.")] = None,
    prefix_cache: Annotated[bool, typer.Option(help="Keep the KV pages of prompts for requests like them.")] = True,
    keep_versions: Annotated[int, typer.Option(help="Versions of each adapter kept to roll back to.")] = 2,
    adapter_root: Annotated[
        Path | None, typer.Option(help="Directory below which /v1/load_lora_adapter may read; without it: nowhere.")
    ] = None,
    data_dir: Annotated[
        Path,
        typer.Option(envvar="LOQUETIER_DATA_DIR", help="Where files, jobs and adapters are kept; of one server."),
    ] = Path("loquetier-data"),
    api_keys: Annotated[Path | None, typer.Option(help="TOML file of hashed API keys.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Listen publicly although there are no keys.")] = False,
    public_metrics: Annotated[bool, typer.Option("--public-metrics", help="/metrics needs no key.")] = False,
    vllm_metrics: Annotated[bool, typer.Option(help="Also emit vLLM's metric names.")] = True,
    grace: Annotated[float, typer.Option(min=0, help="Seconds that open answers get after SIGTERM.")] = 30.0,
    log_level: Annotated[Literal["debug", "info", "warning", "error"], typer.Option(help="Of the JSON log.")] = "info",
) -> None:
    """Serve the OpenAI API over one base and its adapters until SIGTERM or Ctrl-C."""
    check_packages()
    from loquetier.server.settings import ServerSettings

    settings = ServerSettings(
        host=host,
        port=port,
        insecure=insecure,
        public_metrics=public_metrics,
        adapter_root=adapter_root,
        slo_ttft=slo_ttft,
        slo_tpot=slo_tpot,
        stream_interval=stream_interval,
        grace_seconds=grace,
        vllm_metrics=vllm_metrics,
    )
    engine = EngineConfig(
        dtype=dtype,
        adapter_dtype=adapter_dtype,
        serve_only=serve_only,
        device=device,
        async_scheduling=async_scheduling,
        kv_memory=kv_memory,
        adapter_memory=adapter_memory,
        train_memory=train_memory,
        prefix_cache=prefix_cache,
        keep_versions=keep_versions,
        step_time_budget=slo_tpot,
    )
    _serve(base, adapter or [], settings, engine, _Place(data_dir=data_dir, api_keys=api_keys, log_level=log_level))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """What surrounds the server: files and the log."""

    data_dir: Path
    api_keys: Path | None
    log_level: str


def _serve(base: str, named: Sequence[str], settings: ServerSettings, engine: EngineConfig, place: _Place) -> None:
    """Check what can be checked, load the base and answer until the process is told to end."""
    from loquetier.cli import named_directories
    from loquetier.server.auth import KeyRing, load_keys
    from loquetier.server.logs import configure_logs
    from loquetier.server.serve import check_bind, open_socket
    from loquetier.server.serve import serve as run

    keys = KeyRing() if place.api_keys is None else load_keys(place.api_keys)
    check_bind(settings, keys)
    adapters = named_directories(named)
    # The port before the weights: a taken one is told in a second, not after the load.
    opened = open_socket(settings)
    configure_logs(place.log_level)
    services = _load(base, adapters, settings, engine, keys, place.data_dir)
    address, number = opened.getsockname()[:2]
    name = services.runtime.base_name
    typer.echo(f"serving {name} on http://{f'[{address}]' if ':' in address else address}:{number}/v1")
    if code := run(services, opened):
        raise typer.Exit(code)


def _load(
    base: str,
    adapters: Mapping[str, str],
    settings: ServerSettings,
    engine: EngineConfig,
    keys: KeyRing,
    data_dir: Path,
) -> Services:
    """Open the data directory, load base and adapters, and tie the server's parts together."""
    from loquetier.failpoints import fail_points
    from loquetier.runtime import Runtime
    from loquetier.server.services import build_services
    from loquetier.server.store.store import open_store
    from loquetier.server.telemetry import open_telemetry

    telemetry = open_telemetry(os.environ)
    store = open_store(data_dir, fail_point=fail_points(os.environ))
    engine = replace(engine, adapter_spill=str(store.data_dir.spill))
    runtime = Runtime(base, adapters=adapters, config=engine)
    store.bind(runtime.base_name, runtime.base_fingerprint)
    services = build_services(runtime, settings, keys, base_root=base, store=store, telemetry=telemetry)
    for name, directory in adapters.items():
        services.models.note(name, str(Path(directory).absolute()), int(services.wall()))
    return services


def check_packages() -> None:
    """Raises ConfigError where the web packages are not installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"the server needs {', '.join(missing)}, which this installation left out; "
            f"pip install {' '.join(name.replace('_', '-') for name in missing)}"
        )
