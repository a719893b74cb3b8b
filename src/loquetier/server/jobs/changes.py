"""What an owner does to a job or to its models: pause, resume, cancel, delete. Any thread, each change once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import structlog

from loquetier.errors import JobStateError
from loquetier.finetuning import FinetuneHandle
from loquetier.server.auth import Principal
from loquetier.server.jobs.running import RunningJobs, tell
from loquetier.server.problems import ApiError, model_not_found
from loquetier.server.store.datadir import remove_durably
from loquetier.server.store.jobs import JobRow
from loquetier.server.store.store import Store

log = structlog.get_logger("loquetier.server.jobs")

NO_RETRY: Final = {"x-should-retry": "false"}


@dataclass(frozen=True, slots=True)
class JobChanges:
    """On the disk when each of them returns."""

    store: Store
    running: RunningJobs

    def find(self, who: Principal, job_id: str) -> JobRow:
        """One of the caller's jobs. Raises ApiError 404, the same for what does not exist and what is another's."""
        job = self.store.jobs.find(job_id, who.owner)
        if job is None:
            raise no_such_job(job_id)
        return job

    def pause(self, who: Principal, job_id: str) -> JobRow:
        """Stop after the current step until `resume`, restarts included. Raises ApiError 400, 404."""
        return self._change(who, job_id, "pause", lambda job: not job.wants_pause, self._pause)

    def _pause(self, job: JobRow, handle: FinetuneHandle | None) -> None:
        if handle is not None:
            handle.pause()
        with self.store.write() as c:
            if self.store.jobs.update(c, job.id, status="paused", wants_pause=1, reason=None):
                tell(self.store, c, job.id, "The job was paused")

    def resume(self, who: Principal, job_id: str) -> JobRow:
        """Go on after `pause`. Raises ApiError 400, 404."""
        return self._change(who, job_id, "resume", lambda job: job.status == "paused", self._resume)

    def _resume(self, job: JobRow, handle: FinetuneHandle | None) -> None:
        status = "validating_files"
        if handle is not None:
            handle.resume()
            status = "running" if handle.status.is_final else handle.status.value
        with self.store.write() as c:
            if self.store.jobs.update(c, job.id, status=status, wants_pause=0):
                tell(self.store, c, job.id, "The job was resumed")
        if handle is None:
            self.running.launch(job.id, is_restart=True)

    def cancel(self, who: Principal, job_id: str) -> JobRow:
        """End within a step. Raises ApiError 400, 404."""
        return self._change(who, job_id, "cancel", lambda job: True, self._cancel)

    def _cancel(self, job: JobRow, handle: FinetuneHandle | None) -> None:
        # The row first: whatever happens now, an acknowledged end is an end.
        if handle is not None and handle.status.is_final:
            raise JobStateError("it is ending")
        with self.store.write() as c:
            if self.store.jobs.update(c, job.id, status="cancelled", finished_at=int(self.store.wall()), reason=None):
                tell(self.store, c, job.id, "The job was cancelled")
            if handle is None:
                self.store.adapters.forget_unborn(c, job.id)
        if handle is None:  # paused since a restart, or its files are still being looked at
            remove_durably(self.store.data_dir.jobs / job.id)
            self.store.files.tidy()
            return
        try:
            handle.cancel()
        except JobStateError:  # its last step came in between: its owner's word stands
            log.warning("cancelled_at_its_end", job=job.id)

    def _change(
        self,
        who: Principal,
        job_id: str,
        verb: str,
        may: Callable[[JobRow], bool],
        change: Callable[[JobRow, FinetuneHandle | None], None],
    ) -> JobRow:
        """One change of a job at a time. Raises ApiError."""
        self.find(who, job_id)
        with self.running.locks[job_id]:
            job = self.find(who, job_id)
            if job.is_final or not may(job):
                raise wrong_state(job, verb)
            try:
                change(job, self.running.handle(job_id))
            except JobStateError as error:
                raise wrong_state(self.find(who, job_id), verb) from error
        self.running.bell.ring(job_id)
        log.info("job_changed", job=job_id, change=verb)
        return self.find(who, job_id)

    def delete_model(self, name: str) -> int:
        """Forget a job's model or one of its checkpoints; requests under way end on it, and then its files go.

        Returns the bytes of memory freed. Raises ApiError 400 while the job trains it, 404.
        """
        adapter = self.store.adapters.find(name)
        if adapter is None or adapter.job_id is None:
            raise model_not_found(name)
        with self.running.locks[adapter.job_id]:
            job = self.store.jobs.find(adapter.job_id)
            is_open = self.running.handle(adapter.job_id) is not None or (job is not None and not job.is_final)
            if adapter.source == "job" and is_open:
                raise ApiError(
                    400, f"job {adapter.job_id} is training {name!r}; cancel it first", code="adapter_in_use",
                    headers=NO_RETRY,
                )  # fmt: skip
            directories = [version.directory for version in self.store.adapters.versions(name)]
            self.store.fail_point("unload.before_commit")
            with self.store.write() as c:
                gone = self.store.adapters.remove(c, name)
                self.store.jobs.drop_checkpoint(c, name)
        if not gone:
            raise model_not_found(name)
        self.store.fail_point("unload.after_commit")
        freed = self.running.shelf.withdraw([name], directories)
        log.info("model_deleted", model=name)
        return freed


def no_such_job(job_id: str) -> ApiError:
    """404 in OpenAI's words."""
    shown = "".join(c if c.isprintable() else "?" for c in job_id[:64])
    return ApiError(404, f"Could not find fine tune: {shown}", code="fine_tune_not_found", param="fine_tuning_job_id")


def wrong_state(job: JobRow, verb: str) -> ApiError:
    """400, which no client may retry."""
    return ApiError(
        400, f"job {job.id} is {job.status}: it cannot {verb} now", code="invalid_job_state", headers=NO_RETRY
    )
