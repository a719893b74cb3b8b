"""Run the sections, each in a process of its own, and write one JSON whatever happens in them."""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loquetier.errors import ConfigError, LoquetierError

TOTAL_SECONDS = 535.0
"""The whole run; a section that would begin with less than MIN_SECONDS left is not begun."""
MIN_SECONDS = 15.0
SRC = Path(__file__).parents[3]


def main(argv: Sequence[str] | None = None) -> int:
    """0 when every section gave a result, else 1; the file is written in both cases."""
    options = _options(argv)
    if options.section is not None:
        return _run_section(options.section, options.output, dry=options.dry_run)
    from loquetier.bench.gpu.sections import SECTIONS, TARGETS

    try:
        _check(options, {s.name for s in SECTIONS})
    except LoquetierError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    output = options.output or Path(
        "bench-output/gpu-dry-run.json" if options.dry_run else f"docs/benchmarks/{_name()}"
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + TOTAL_SECONDS
    report: dict[str, Any] = {"machine": _machine(dry=options.dry_run), "sections": {}, "targets": []}
    for section in SECTIONS:
        if options.only and section.name not in options.only:
            continue
        seconds = min(section.seconds, ends - time.monotonic())
        outcome = _isolated(section.name, seconds, dry=options.dry_run)
        report["sections"][section.name] = outcome
        failure = outcome.get("error")
        print(
            f"{section.name:14} {outcome['seconds']:6.1f} s  " + (failure["message"][:150] if failure else "ok"),
            flush=True,
        )
        # Written after each: a run that is cut off has what it measured.
        report["targets"] = [] if options.dry_run else [t.judged(report["sections"]) for t in TARGETS]
        output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for judged in report["targets"]:
        print(f"{judged['measure']:45} {judged['value']}  goal {judged['goal']}  met: {judged['met']}")
    print(f"written to {output}")
    return int(any("error" in s for s in report["sections"].values()))


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loquetier.bench.gpu", description=__doc__)
    parser.add_argument(
        "--dry-run", action="store_true", help="a tiny shape on the CPU: tests the script, measures nothing"
    )
    parser.add_argument("--output", type=Path, help="where the JSON goes; docs/benchmarks/gpu-NAME.json without it")
    parser.add_argument("--only", action="append", metavar="SECTION", help="run this section; repeatable")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _check(options: argparse.Namespace, names: set[str]) -> None:
    import torch

    unknown = set(options.only or ()) - names
    if unknown:
        raise ConfigError(f"--only {' '.join(sorted(unknown))}: there are {', '.join(sorted(names))}")
    if not options.dry_run and not torch.cuda.is_available():
        raise ConfigError("bench-gpu: no CUDA device is visible; --dry-run tries the script on a CPU")


def _isolated(name: str, seconds: float, *, dry: bool) -> dict[str, Any]:
    """A section's outcome: ``{"seconds", "result"}``, or ``{"seconds", "error": {"type", "message"}}``."""
    if seconds < MIN_SECONDS:
        return {"seconds": 0.0, "error": {"type": "NoTimeLeft", "message": f"{seconds:.0f} s of {TOTAL_SECONDS} left"}}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "outcome.json"
        command = [sys.executable, "-m", "loquetier.bench.gpu", "--section", name, "--output", str(output)]
        path = os.pathsep.join([str(SRC), *filter(None, [os.environ.get("PYTHONPATH")])])
        process = subprocess.Popen(
            [*command, *(["--dry-run"] if dry else [])],
            stderr=subprocess.PIPE, text=True, start_new_session=True, env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
        try:
            _, stderr = process.communicate(timeout=seconds)
            outcome = _read(output, process.returncode, stderr)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its own session: nothing else is in it
            _, stderr = process.communicate()
            outcome = {
                "error": {"type": "TimedOut", "message": f"not done in {seconds:.0f} s", "stderr": stderr[-2000:]}
            }
    return {"seconds": round(time.monotonic() - started, 1), **outcome}


def _read(output: Path, code: int, stderr: str) -> dict[str, Any]:
    if output.is_file():
        outcome: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
        return outcome
    return {"error": {"type": "Crashed", "message": f"ended with code {code}", "stderr": stderr[-2000:]}}


def _run_section(name: str, output: Path, *, dry: bool) -> int:
    """In the section's own process."""
    import torch

    from loquetier.bench.gpu.sections import SECTIONS
    from loquetier.bench.gpu.shapes import LLAMA_3_8B, TINY

    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    section = next(s for s in SECTIONS if s.name == name)
    outcome: dict[str, Any]
    try:
        outcome = {"result": section.run(TINY if dry else LLAMA_3_8B)}
    except Exception as error:  # whatever it is, it is the outcome of this section
        logging.exception("section %s failed", name)
        outcome = {"error": {"type": type(error).__name__, "message": str(error)[:4000]}}
    if torch.cuda.is_available() and not dry:
        outcome["peak_bytes"] = torch.cuda.max_memory_allocated()
    output.write_text(json.dumps(outcome), encoding="utf-8")
    return int("error" in outcome)


def _machine(*, dry: bool) -> dict[str, Any]:
    import torch
    import transformers

    has_gpu = torch.cuda.is_available() and not dry
    return {
        "dry_run": dry,
        "device": torch.cuda.get_device_name() if has_gpu else f"CPU, {platform.machine()}",
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory if has_gpu else None,
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
            "transformers": transformers.__version__, "triton": _version("triton"), "peft": _version("peft"),
        },
        "commit": _commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """None where there is no repository: a copy of the tree was sent to the machine."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=SRC, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def _name() -> str:
    """``gpu-nvidia-h200.json``, say."""
    import torch

    return "gpu-" + "-".join(torch.cuda.get_device_name().lower().split()) + ".json"


if __name__ == "__main__":
    sys.exit(main())
