"""Holds: two at once, and who may end them."""

from __future__ import annotations

from loquetier.adapters.spec import LoraSpec
from loquetier.config import TrainingConfig
from loquetier.training import holds
from loquetier.training.job import FinetuneJob, JobStatus


def running_job() -> FinetuneJob:
    job = FinetuneJob(1, "job", LoraSpec(), TrainingConfig())
    job.move(JobStatus.QUEUED)
    job.move(JobStatus.RUNNING)
    return job


def test_it_goes_on_when_the_last_of_two_holds_is_over() -> None:
    job = running_job()
    assert holds.add(job, "checkpoints", "no room for a checkpoint")
    assert not holds.add(job, "files", "no room for a line")  # paused already: its listener has heard
    assert not holds.drop(job, "files")
    assert (job.status, job.reason) == (JobStatus.PAUSED, "no room for a checkpoint")
    holds.add(job, "files", "no room for a line")
    assert not holds.drop(job, "checkpoints")
    assert (job.status, job.reason) == (JobStatus.PAUSED, "no room for a line")
    assert holds.drop(job, "files")
    assert (job.status, job.reason) == (JobStatus.RUNNING, None)


def test_a_hold_that_ends_does_not_run_what_its_owner_paused() -> None:
    job = running_job()
    holds.add(job, "files", "no room for a line")
    assert holds.keep_paused(job, JobStatus.PAUSED) and holds.hand_over(job, JobStatus.PAUSED, "wanted")
    assert not holds.drop(job, "files")
    assert (job.status, job.reason) == (JobStatus.PAUSED, "wanted")
