"""`loquetier adapters`: those of a running server, and `export`, which reads a data directory and needs none."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from loquetier.cli_options import DEFAULT_URL, JsonOption, KeyOption, UrlOption

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="The adapter's name.")]
VersionArgument = Annotated[int, typer.Argument(min=1, metavar="VERSION", help="The number behind the @.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    adapters = typer.Typer(no_args_is_help=True, help="Adapters of a running server, and of a data directory.")
    adapters.command("list")(list_adapters)
    adapters.command("load")(load)
    adapters.command("unload")(unload)
    adapters.command("rollback")(rollback)
    adapters.command("promote")(promote)
    adapters.command("pin")(pin)
    adapters.command("export")(export)
    app.add_typer(adapters, name="adapters")


def list_adapters(as_json: JsonOption = False, url: UrlOption = DEFAULT_URL, api_key: KeyOption = None) -> None:
    """Every version that the server has; the one that answers under its name is marked."""
    from loquetier.cli_client import connected, print_json
    from loquetier.cli_view import adapter_table, print_table

    with connected(url, api_key) as api:
        found = api.get("/v1/lora_adapters").get("data", [])
    if as_json:
        print_json(found)
    else:
        print_table(adapter_table(found))


def load(
    name: NameArgument,
    path: Annotated[str, typer.Argument(metavar="PATH", help="PEFT directory, as the server sees it.")],
    replace: Annotated[bool, typer.Option("--replace", help="Over an adapter of that name: a new version.")] = False,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = None,
) -> None:
    """Serve a PEFT directory below the server's --adapter-root."""
    _tell("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path, "load_inplace": replace}, url, api_key)


def unload(name: NameArgument, url: UrlOption = DEFAULT_URL, api_key: KeyOption = None) -> None:
    """Stop serving an adapter; requests under way end on it."""
    _tell("/v1/unload_lora_adapter", {"lora_name": name}, url, api_key)


def rollback(
    name: NameArgument,
    to: Annotated[int | None, typer.Option(min=1, help="The version; without it: the one before the live one.")] = None,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = None,
) -> None:
    """Have an older version answer under the name again."""
    _make_live(name, to if to is not None else _before_live(name, url, api_key), url, api_key)


def promote(
    name: NameArgument, version: VersionArgument, url: UrlOption = DEFAULT_URL, api_key: KeyOption = None
) -> None:
    """Have this version, older or newer, answer under the name."""
    _make_live(name, version, url, api_key)


def pin(
    name: NameArgument,
    off: Annotated[bool, typer.Option("--off", help="It may be taken out of memory again.")] = False,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = None,
) -> None:
    """Bring an adapter into memory and keep it there, however little it is used."""
    _tell(f"/v1/adapters/{'unpin' if off else 'pin'}", {"lora_name": name}, url, api_key)


def export(
    model: Annotated[str, typer.Argument(metavar="NAME", help="An adapter's name, or NAME@VERSION.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="New directory for the adapter (PEFT format).")],
    data_dir: Annotated[
        Path, typer.Option(envvar="LOQUETIER_DATA_DIR", help="The server's data directory; it may run or not.")
    ] = Path("loquetier-data"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an adapter that is there.")] = False,
) -> None:
    """Write an adapter of a data directory as a PEFT directory, checked against its digest."""
    from loquetier.server.store.export import export_adapter

    label = export_adapter(data_dir, model, directory, overwrite=overwrite)
    print(f"{label} is in {directory}")


def _make_live(name: str, version: int, url: str, api_key: str | None) -> None:
    from loquetier.cli_client import connected

    with connected(url, api_key) as api:
        found = api.post("/v1/rollback_lora_adapter", {"lora_name": name, "version": version})
    print(f"{found['lora_name']}@{found['version']} answers as {found['lora_name']}")


def _before_live(name: str, url: str, api_key: str | None) -> int:
    """The newest version below the live one. Raises AdapterNotFoundError."""
    from loquetier.cli_client import connected
    from loquetier.errors import AdapterNotFoundError

    with connected(url, api_key) as api:
        data = api.get("/v1/lora_adapters").get("data", [])
    own = [v for v in data if v.get("lora_name") == name]
    live = max((v["version"] for v in own if v.get("live")), default=0)
    older = [v["version"] for v in own if v["version"] < live]
    if not older:
        raise AdapterNotFoundError(f"no version of {name!r} is older than the live one; see `loquetier adapters list`")
    return int(max(older))


def _tell(path: str, body: dict[str, Any], url: str, api_key: str | None) -> None:
    from loquetier.cli_client import connected, printable

    with connected(url, api_key) as api:
        found = api.post(path, body)
    print(printable(str(found.get("message") or f"{body['lora_name']}: done")))
