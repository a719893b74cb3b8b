"""Which backend runs each kernel, and why."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Final

from loquetier.errors import ConfigError
from loquetier.kernels import selfcheck, selfcheck_base
from loquetier.kernels.build import BuildError, built_library
from loquetier.kernels.native import NativeLibrary

log = logging.getLogger("loquetier.kernels")

CHECKS: Final = {**selfcheck_base.CHECKS, **selfcheck.CHECKS}
"""By kernel name; a kernel without an entry has no C version."""

VARIABLE: Final = "LOQUETIER_KERNELS"
BACKENDS: Final = ("auto", "reference", "cpu", "triton")
"""Values that `VARIABLE` accepts."""
KERNELS: Final = ("base_gemm", "row_ops", "smlm_forward", "smlm_backward", "decode_attention", "span_attention")


@dataclass(frozen=True, slots=True)
class KernelChoice:
    """What runs for one kernel."""

    backend: str
    reason: str


@dataclass(frozen=True, slots=True)
class Kernels:
    """The backend of each kernel of KERNELS, and the C library if any of them uses it."""

    choices: Mapping[str, KernelChoice]
    library: NativeLibrary | None = None

    def native(self, kernel: str) -> NativeLibrary | None:
        """The C library when this kernel runs in C, else None."""
        return self.library if self.choices[kernel].backend == "cpu" else None


def choose_kernels(environ: Mapping[str, str]) -> Kernels:
    """Decide by `environ`'s LOQUETIER_KERNELS; may compile the C library (seconds, once per machine).

    Raises:
        ConfigError: the value is unknown or names a backend that cannot run here.
    """
    wanted = environ.get(VARIABLE, "auto")
    if wanted not in BACKENDS:
        raise ConfigError(f"{VARIABLE}={wanted!r}: must be one of {', '.join(BACKENDS)}; unset it for auto")
    if wanted == "triton":
        raise ConfigError(f"{VARIABLE}=triton: not in this version; use cpu, reference, or unset it")
    if wanted == "reference":
        return _all_reference(f"{VARIABLE} asks for it")
    try:
        built = built_library(environ=environ)
        library = NativeLibrary(built.path)
    except BuildError as error:
        if wanted == "cpu":
            raise ConfigError(f"{VARIABLE}=cpu: {error}; or unset {VARIABLE} to run plain torch") from error
        log.warning("plain torch instead of C kernels: %s", error)
        return _all_reference(f"plain torch: {error}")
    reason = f"{library.isa}, {built.origin}, {library.threads}"
    choices = {kernel: _checked(kernel, library, reason, forced=wanted == "cpu") for kernel in KERNELS}
    log.info("C kernels: %s", reason)
    return Kernels(choices, library)


def _all_reference(reason: str) -> Kernels:
    return Kernels({kernel: KernelChoice("reference", reason) for kernel in KERNELS})


def _checked(kernel: str, library: NativeLibrary, reason: str, *, forced: bool) -> KernelChoice:
    """C when it passes its self-check."""
    check = CHECKS.get(kernel)
    if check is None:
        return KernelChoice("reference", "plain torch: this version has no C kernel for it")
    fault = check(library)
    if fault is None:
        return KernelChoice("cpu", reason)
    message = f"the C kernel {kernel} ({library.isa}) disagrees with the reference: {fault}"
    if forced:
        raise ConfigError(f"{VARIABLE}=cpu: {message}; unset {VARIABLE} to run plain torch, and report this")
    log.error("%s; plain torch runs instead", message)
    return KernelChoice("reference", f"plain torch: {message}")


@cache
def process_kernels() -> Kernels:
    """This process's choice, made when first asked for: at the start of an engine, never at import."""
    return choose_kernels(os.environ)


def active_kernels(environ: Mapping[str, str]) -> Mapping[str, KernelChoice]:
    """The backend of each kernel of KERNELS under `environ`. Raises ConfigError as `choose_kernels`."""
    return choose_kernels(environ).choices
