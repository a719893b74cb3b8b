"""Which backend runs each kernel, and why. The seam where compiled backends plug in. No torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from loquetier.errors import ConfigError

VARIABLE: Final = "LOQUETIER_KERNELS"
BACKENDS: Final = ("reference",)
"""Values that `VARIABLE` accepts."""
KERNELS: Final = ("shrink", "expand", "wgrad", "span_attention", "decode_attention")


@dataclass(frozen=True, slots=True)
class KernelChoice:
    """What runs for one kernel."""

    backend: str
    reason: str


def active_kernels(environ: Mapping[str, str] | None = None) -> dict[str, KernelChoice]:
    """The backend of each kernel of KERNELS.

    Args:
        environ: where LOQUETIER_KERNELS is looked up; None = the process environment.

    Raises:
        ConfigError: LOQUETIER_KERNELS names a backend that this version does not have.
    """
    wanted = (os.environ if environ is None else environ).get(VARIABLE)
    if wanted is not None and wanted not in BACKENDS:
        raise ConfigError(
            f"{VARIABLE}={wanted!r}: this version has {', '.join(BACKENDS)}; unset it or use one of these"
        )
    reason = f"{VARIABLE} asks for it" if wanted else "plain torch: the only backend that this version has"
    return {kernel: KernelChoice("reference", reason) for kernel in KERNELS}
