"""Holds: a job that cannot go on for now (a full disk) is paused by them, and goes on by itself when the last is over.

Its owner may pause and resume it meanwhile: then it stays paused, and only who keeps it paused changes. Each function
says whether the job's listener has something to hear.
"""

from __future__ import annotations

from loquetier.training.job import FinetuneJob
from loquetier.training.states import JobStatus


def add(job: FinetuneJob, key: str, reason: str) -> bool:
    """There is one more hold, or a newer reason for one that stands."""
    if job.status.is_final:
        return False
    job.holds[key] = reason
    if job.is_held:
        job.reason = reason
    return obey(job)


def obey(job: FinetuneJob) -> bool:
    """Pause a running job that has holds."""
    if not job.holds or job.status is not JobStatus.RUNNING:
        return False
    job.is_held = True
    job.move(JobStatus.PAUSED, _reason(job))
    return True


def drop(job: FinetuneJob, key: str) -> bool:
    """A hold is over."""
    job.holds.pop(key, None)
    if not job.is_held or job.status.is_final:
        return False
    if job.holds:
        job.reason = _reason(job)
        return False
    job.is_held = False
    job.move(JobStatus.RUNNING)
    return True


def keep_paused(job: FinetuneJob, wanted: JobStatus) -> bool:
    """Whether a job is paused and stays so, although its owner wants it paused or running."""
    is_again = wanted is JobStatus.PAUSED and not job.is_held  # paused twice: refused as ever
    return job.status is JobStatus.PAUSED and bool(job.holds) and not is_again


def hand_over(job: FinetuneJob, wanted: JobStatus, reason: str | None) -> bool:
    """Its owner takes over from the holds (paused), or leaves it to them (running)."""
    is_held = wanted is JobStatus.RUNNING
    if job.is_held is is_held:
        return False
    job.is_held, job.reason = is_held, _reason(job) if is_held else reason
    return True


def _reason(job: FinetuneJob) -> str:
    return next(iter(job.holds.values()))
