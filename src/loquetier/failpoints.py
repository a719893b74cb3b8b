"""Named places at which a test has the process killed, as a power cut would: no cleanup, no flush, no goodbye.

``LOQUETIER_FAILPOINT=name`` kills at the first pass through the place called `name`, ``name:3`` at the third.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from typing import Final

from loquetier.errors import ConfigError

VARIABLE: Final = "LOQUETIER_FAILPOINT"
POINTS: Final = (
    "checkpoint.before_write",
    "checkpoint.after_weights",
    "checkpoint.after_optimizer",
    "checkpoint.before_rename",
    "checkpoint.after_rename",
    "checkpoint.before_prune",
    "checkpoint.in_prune",
    "job.before_publish",
    "job.after_step",
    "job.before_end",
    "files.after_row",
    "files.before_replace",
)
"""Every place that a job passes."""
SERVER_POINTS: Final = (
    "upload.before_rename",
    "upload.before_commit",
    "upload.after_commit",
    "create.before_commit",
    "create.after_commit",
    "adapter.before_rename",
    "adapter.before_commit",
    "load.after_commit",
    "finish.before_commit",
    "finish.after_commit",
    "unload.before_commit",
    "unload.after_commit",
)
"""Every place that only the server passes, on its way to something durable."""
FailPoint = Callable[[str], None]
"""Called with the name of the place that the program passes."""


def no_fail_point(name: str) -> None:
    """What runs when nobody asked for a failure."""


def fail_points(environ: Mapping[str, str]) -> FailPoint:
    """What the environment asks for; made once where a runtime starts, and handed to the parts that pass the places.

    Raises:
        ConfigError: the variable names no place, or its count is not a positive integer.
    """
    wanted = environ.get(VARIABLE, "")
    if not wanted:
        return no_fail_point
    name, colon, text = wanted.partition(":")
    if name not in (*POINTS, *SERVER_POINTS) or (colon and not (text.isascii() and text.isdigit() and int(text) > 0)):
        known = ", ".join((*POINTS, *SERVER_POINTS))
        raise ConfigError(f"{VARIABLE}={wanted!r}: must be NAME or NAME:COUNT with NAME one of {known}")
    left = int(text) if colon else 1

    def hit(at: str) -> None:
        nonlocal left
        if at == name:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    return hit
