"""The C kernels as a shared library: the prebuilt one of the package, or compiled once into the cache. No torch.

Nothing here runs at import. A library is named by a hash of sources, flags and compiler, written under a temporary
name and renamed: two processes may compile at once, a kill in the middle leaves no half a library behind.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from loquetier.cache_dir import default_cache_dir

SOURCE_DIR = Path(__file__).parent / "csrc"
PREBUILT = Path(__file__).parent / "_kernels.so"
"""In a wheel made by `make wheel`; not in a source checkout, where it would outlive a change of the sources."""
FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math")
"""No -ffast-math: NaN and infinity mean something here. No -march: variants carry their own target attributes."""
TIMEOUT = 120
"""Seconds after which a compiler counts as broken; it needs a few."""


class BuildError(Exception):
    """There is no library; the message is one line that says why and what helps."""


@dataclass(frozen=True, slots=True)
class Built:
    """A library file and where it came from, in words."""

    path: Path
    origin: str


def sources() -> list[Path]:
    """The C files, sorted."""
    return sorted(SOURCE_DIR.glob("*.c"))


def source_hash() -> str:
    """Changes when a C file or header does; compiled into the library, so that a stale one is recognised."""
    digest = hashlib.sha256()
    for path in sorted([*SOURCE_DIR.glob("*.c"), *SOURCE_DIR.glob("*.h")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def find_compiler(environ: Mapping[str, str] | None = None) -> str:
    """Path of ``$CC``, else cc, gcc or clang. Raises BuildError when there is none."""
    environ = os.environ if environ is None else environ
    wanted = environ.get("CC")
    for name in [wanted] if wanted else ["cc", "gcc", "clang"]:
        if found := shutil.which(name, path=environ.get("PATH")):
            return found
    if wanted:
        raise BuildError(f"CC={wanted!r} is not a program on PATH")
    raise BuildError("no C compiler (cc, gcc or clang) on PATH: install one")


def compile_library(compiler: str, output: Path, extra_flags: Sequence[str] = ()) -> None:
    """Compile every source, all at once, and link them. Raises BuildError with the compiler's first complaint."""
    flags = [*FLAGS, *extra_flags]
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".objects-") as directory:
        objects = {path: Path(directory) / f"{path.stem}.o" for path in sources()}
        commands = [
            [compiler, *flags, f'-DLQ_SOURCE_HASH="{source_hash()}"', "-c", str(path), "-o", str(made)]
            for path, made in objects.items()
        ]
        with ThreadPoolExecutor(len(commands)) as pool:
            list(pool.map(_run_compiler, commands))
        _run_compiler([compiler, *flags, "-shared", *map(str, objects.values()), "-o", str(output), "-lm"])


def _run_compiler(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} did not run: {error}") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        complaint = next((line for line in lines if "error" in line), lines[0] if lines else "no message")
        raise BuildError(f"{command[0]} failed (exit code {done.returncode}): {complaint.strip()}")


def built_library(cache_dir: Path | None = None, environ: Mapping[str, str] | None = None) -> Built:
    """The library for these sources: prebuilt, from the cache, or compiled now. Raises BuildError."""
    if PREBUILT.is_file():
        return Built(PREBUILT, "prebuilt in the package")
    compiler = find_compiler(environ)
    key = hashlib.sha256("\0".join([source_hash(), *FLAGS, _version(compiler), platform.machine()]).encode())
    try:
        directory = (cache_dir if cache_dir is not None else default_cache_dir()) / "kernels"
        target = directory / f"kernels-{key.hexdigest()[:24]}.so"
        if target.is_file():
            return Built(target, f"compiled before by {compiler}")
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=directory, prefix=".compiling-"))
    except (OSError, RuntimeError) as error:  # RuntimeError: no home directory
        raise BuildError(f"the cache cannot be written ({error}); set LOQUETIER_CACHE elsewhere") from error
    started = time.perf_counter()
    try:
        compile_library(compiler, temporary / target.name)
        os.replace(temporary / target.name, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Built(target, f"compiled in {time.perf_counter() - started:.1f} s by {compiler}")


def _version(compiler: str) -> str:
    """First line of ``--version``: another compiler is another library."""
    try:
        done = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{compiler} did not run: {error}") from error
    return compiler + done.stdout.partition("\n")[0]


if __name__ == "__main__":  # `make wheel`: compile to where the package looks first
    compile_library(find_compiler(), Path(sys.argv[1]))
