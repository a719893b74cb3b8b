"""Which backend runs each kernel on each kind of device, and why.

On a CPU: C, else plain torch; Triton only in its interpreter, when asked for. On a GPU: Triton, else plain torch.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Final

import torch

from loquetier.errors import ConfigError
from loquetier.kernels import selfcheck, selfcheck_base, selfcheck_train, triton_load, varlen
from loquetier.kernels.build import BuildError, built_library
from loquetier.kernels.gemm import AMX, NO_KERNEL, GemmKernel
from loquetier.kernels.native import NativeLibrary

log = logging.getLogger("loquetier.kernels")

CHECKS: Final = {**selfcheck_base.CHECKS, **selfcheck.CHECKS, **selfcheck_train.CHECKS}
"""By kernel name; a kernel without an entry has no C version."""

VARIABLE: Final = "LOQUETIER_KERNELS"
BACKENDS: Final = ("auto", "reference", "cpu", "triton")
"""Values that `VARIABLE` accepts."""
KERNELS: Final = (
    "base_gemm", "row_ops", "kv_write", "smlm_forward", "smlm_backward", "decode_attention", "prefill_attention",
    "span_attention", "sample", "train_attention", "row_grads", "cross_entropy", "smlm_long",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class KernelChoice:
    """What runs for one kernel."""

    backend: str
    reason: str
    fault: str | None = None
    """Of a kernel that would run here, and does not because its self-check found this."""


@dataclass(frozen=True, slots=True)
class Kernels:
    """The backend of each kernel of KERNELS on one kind of device, and the C library if any of them uses it."""

    choices: Mapping[str, KernelChoice]
    library: NativeLibrary | None = None

    def native(self, kernel: str) -> NativeLibrary | None:
        """The C library when this kernel runs in C, else None."""
        return self.library if self.choices[kernel].backend == "cpu" else None

    def in_triton(self, kernel: str) -> bool:
        """True when this kernel runs in Triton."""
        return self.choices[kernel].backend == "triton"


def choose_kernels(environ: Mapping[str, str], device_type: str = "cpu") -> Kernels:
    """Decide by `environ`'s LOQUETIER_KERNELS; may compile (C: seconds, once per machine; Triton: its self-checks').

    Args:
        device_type: "cpu" or "cuda": where the tensors are that the kernels will get.

    Raises:
        ConfigError: the value is unknown or names a backend that cannot run here.
    """
    wanted = environ.get(VARIABLE, "auto")
    if wanted not in BACKENDS:
        raise ConfigError(f"{VARIABLE}={wanted!r}: must be one of {', '.join(BACKENDS)}; unset it for auto")
    if wanted == "reference":
        return _all_reference(f"{VARIABLE} asks for it")
    if wanted == "triton" or device_type != "cpu":
        return _triton(environ, wanted, device_type)
    return _native(environ, wanted)


def _triton(environ: Mapping[str, str], wanted: str, device_type: str) -> Kernels:
    if wanted == "cpu":
        raise ConfigError(f"{VARIABLE}=cpu: C kernels do not run on {device_type}; unset it, or choose device='cpu'")
    missing = triton_load.why_not(environ, device_type)
    if missing is not None:
        if wanted == "triton":
            raise ConfigError(f"{VARIABLE}=triton: {missing}; or unset {VARIABLE}")
        log.warning("plain torch instead of Triton kernels on %s: %s", device_type, missing)
        return _all_reference(f"plain torch: {missing}")
    device = torch.device(device_type)
    checks = triton_load.checks()
    reason = triton_load.describe(device)
    choices = {k: _checked_triton(k, checks.get(k), device, reason, forced=wanted == "triton") for k in KERNELS}
    choices["span_attention"] = _packed(device)
    log.info("Triton kernels on %s: %s", device_type, reason)
    return Kernels(choices)


def _packed(device: torch.device) -> KernelChoice:
    """Attention of train rows: torch's own kernel over all sequences at once, where it has one that agrees."""
    fault = varlen.why_not(device)
    if fault is None:
        return KernelChoice("packed", f"torch {torch.__version__}, flash attention over packed sequences")
    if device.type != "cpu":
        log.warning("train rows attend a sequence at a time: %s", fault)
    return KernelChoice("reference", f"plain torch: {fault}", None if varlen.is_absent(device) else fault)


def _checked_triton(
    kernel: str, check: triton_load.Check | None, device: torch.device, reason: str, *, forced: bool
) -> KernelChoice:
    """Triton when it passes its self-check."""
    if check is None:
        return KernelChoice("reference", "plain torch: this version has no Triton kernel for it")
    fault = triton_load.fault_of(check, device)
    if fault is None:
        return KernelChoice("triton", reason)
    message = f"the Triton kernel {kernel} on {device.type} does not do what the reference does: {fault}"
    if forced:
        raise ConfigError(f"{VARIABLE}=triton: {message}; unset {VARIABLE} to run plain torch, and report this")
    log.error("%s; plain torch runs instead", message)
    return KernelChoice("reference", f"plain torch: {message}", fault)


def _native(environ: Mapping[str, str], wanted: str) -> Kernels:
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
        missing = _missing(kernel, library)
        return KernelChoice("cpu", reason) if missing is None else KernelChoice("reference", f"plain torch: {missing}")
    message = f"the C kernel {kernel} ({library.isa}) disagrees with the reference: {fault}"
    if forced:
        raise ConfigError(f"{VARIABLE}=cpu: {message}; unset {VARIABLE} to run plain torch, and report this")
    log.error("%s; plain torch runs instead", message)
    return KernelChoice("reference", f"plain torch: {message}", fault)


def _missing(kernel: str, library: NativeLibrary) -> str | None:
    """Why this machine cannot run a C kernel that there is for some instruction sets only."""
    level = GemmKernel(library).level
    if kernel == "base_gemm" and level == NO_KERNEL:
        return "its C kernel needs AVX512_BF16 or AMX"
    return "its C kernel needs AMX" if kernel == "smlm_long" and level < AMX else None


@cache
def process_kernels(device_type: str = "cpu") -> Kernels:
    """This process's choice for one kind of device, made when first asked for: at the start of an engine."""
    return choose_kernels(os.environ, device_type)


def active_kernels(environ: Mapping[str, str], device_type: str = "cpu") -> Mapping[str, KernelChoice]:
    """The backend of each kernel of KERNELS under `environ`. Raises ConfigError as `choose_kernels`."""
    return choose_kernels(environ, device_type).choices
