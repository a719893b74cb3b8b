"""`loquetier validate FILE`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(name="validate")(validate_file)


def validate_file(
    file: Annotated[Path, typer.Argument(help="JSON lines, JSON array, CSV or parquet; also .gz or .zst.")],
    base: Annotated[
        str, typer.Option("--base", help="Whose tokenizer and chat template: preset, directory, GGUF file or hub id.")
    ] = "smollm2-135m",
    max_seq_len: Annotated[int, typer.Option(min=2, help="Tokens after which an example is cut.")] = 1024,
    min_examples: Annotated[int, typer.Option(min=1, help="Fewer examples are an error.")] = 1,
    max_problems: Annotated[int, typer.Option(min=1, help="Errors, and warnings, to list; all are counted.")] = 100,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """List every problem of a training file, its token statistics and three masked examples. Exit code 1: errors."""
    from loquetier.base.loading import load_tokenizer
    from loquetier.training.validate import validate

    report = validate(file, load_tokenizer(base), max_seq_len, min_examples=min_examples, max_problems=max_problems)
    if as_json:
        print(json.dumps(asdict(report) | {"ok": report.ok}, indent=2))
    else:
        from rich.console import Console

        from loquetier.validate_view import print_report

        print_report(report, Console(highlight=False))
    if not report.ok:
        raise typer.Exit(1)
