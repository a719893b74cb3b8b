"""`make sanitize`: the C kernels' tests with the library compiled under AddressSanitizer and UBSan.

Tensors come from the sanitizer's malloc, so a read or write beyond one is an error. Leaks are not looked for: Python
frees little at exit.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from loquetier.kernels.build import BuildError, find_compiler

TESTS = (
    "test_native_smlm.py",
    "test_native_attention.py",
    "test_native_prefill.py",
    "test_native_gemm.py",
    "test_native_rowops.py",
    "test_native_sample.py",
    "test_native_rowgrads.py",
    "test_native_train_attention.py",
    "test_native_smlm_long.py",
    "test_native_loss.py",
    "../parity/test_deferred_rotary.py",  # KV write outside of the stack
    "../parity/test_fused_stack.py",  # the decoder stack as one call, adapters and teams of threads included
    "../parity/test_stack_segments.py",  # and layouts of segments that end at the borders of its tiles
)
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"


def runtime_of(compiler: str, library: str) -> Path | None:
    """Where the compiler keeps a sanitizer's runtime; None when it has none."""
    done = subprocess.run([compiler, f"-print-file-name={library}"], capture_output=True, text=True, check=False)
    path = Path(done.stdout.strip())
    return path if path.is_absolute() and path.is_file() else None


def main() -> int:
    """Exit code of pytest; 0 with one line when the compiler has no sanitizers."""
    try:
        compiler = find_compiler()
    except BuildError as error:
        print(f"skipped: {error}")
        return 0
    runtimes = [runtime_of(compiler, name) for name in ("libasan.so", "libubsan.so")]
    if None in runtimes:
        print(f"skipped: {compiler} has no libasan.so and libubsan.so to preload")
        return 0
    with tempfile.TemporaryDirectory() as directory:
        wrapper = Path(directory) / "cc"
        wrapper.write_text(f'#!/bin/sh\nexec "{compiler}" "$@" {FLAGS} -O1\n')
        wrapper.chmod(0o700)
        cache = Path(directory) / "cache"
        environ = os.environ | {
            "CC": str(wrapper),
            "LOQUETIER_CACHE": str(cache),
            "LD_PRELOAD": " ".join(map(str, runtimes)),
            "ASAN_OPTIONS": "detect_leaks=0",
        }
        tests = [str(Path(__file__).parent / "unit" / name) for name in TESTS]
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
        code = subprocess.run(command, env=environ, check=False).returncode
        libraries = list(cache.rglob("*.so"))
        if len(libraries) != 1 or b"__asan_report" not in libraries[0].read_bytes():
            print("the tests did not run on a sanitized library")
            return 1
    return code


if __name__ == "__main__":
    sys.exit(main())
