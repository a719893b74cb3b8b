"""The states of a job and which may follow which: a table, and nothing else decides.

validating_files -> queued -> running -> succeeded
       |              |         |
       +---- any of them <-> paused; any of them -> failed, cancelled; with memory also -> detached
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final

from loquetier.errors import JobStateError


class JobStatus(enum.Enum):
    """States of a job; the last four are final."""

    VALIDATING_FILES = "validating_files"
    """Its data is being read, encoded and checked on another thread."""
    QUEUED = "queued"
    """Waits for its turn and for memory; it holds none but its data."""
    RUNNING = "running"
    PAUSED = "paused"
    """Nothing of it is computed. It keeps the memory it has, its optimizer's state included."""
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    DETACHED = "detached"
    """Taken out with its whole state, to go on in another runtime."""

    @property
    def is_final(self) -> bool:
        """True when the job will never run again."""
        return self in _FINAL


_FINAL: Final = frozenset({JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED, JobStatus.DETACHED})
_STOPPED: Final = frozenset({JobStatus.FAILED, JobStatus.CANCELLED})

TRANSITIONS: Final[Mapping[JobStatus, frozenset[JobStatus]]] = {
    JobStatus.VALIDATING_FILES: _STOPPED | {JobStatus.QUEUED, JobStatus.PAUSED},
    JobStatus.QUEUED: _STOPPED | {JobStatus.RUNNING, JobStatus.PAUSED},
    JobStatus.RUNNING: _FINAL | {JobStatus.PAUSED},
    # SUCCEEDED: its last step, or the evaluation after it, was already under way when it was paused. Where it goes on
    # depends on how far it was: see `resumed`.
    JobStatus.PAUSED: _FINAL | {JobStatus.VALIDATING_FILES, JobStatus.QUEUED, JobStatus.RUNNING},
    **dict.fromkeys(_FINAL, frozenset()),
}
"""From each state, where to."""


def check_transition(name: str, before: JobStatus, after: JobStatus) -> None:
    """Whether a job may make this transition.

    Raises:
        JobStateError: it may not.
    """
    if after not in TRANSITIONS[before]:
        raise JobStateError(f"job {name!r} is {before.value} and cannot become {after.value}")


def resumed(*, has_data: bool, has_memory: bool) -> JobStatus:
    """Where a paused job goes on."""
    if has_memory:
        return JobStatus.RUNNING
    return JobStatus.QUEUED if has_data else JobStatus.VALIDATING_FILES
