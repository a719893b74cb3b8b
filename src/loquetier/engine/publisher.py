"""Publishing: weights in training become a served version, in memory, between two steps. Engine thread only."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

from torch import Tensor

from loquetier.adapters.arena import Arena
from loquetier.engine.admission import Admission
from loquetier.engine.residency import Residency
from loquetier.engine.tally import SECONDS, Tally
from loquetier.errors import OutOfAdapterMemoryError
from loquetier.failpoints import FailPoint, no_fail_point
from loquetier.training.job import FinetuneJob, JobStatus

log = logging.getLogger("loquetier.jobs")


@dataclass(slots=True)
class Publisher:
    """Makes versions of jobs' weights, and counts what that took."""

    arena: Arena
    residency: Residency
    admission: Admission
    fail_point: FailPoint = no_fail_point
    template_fingerprint: str | None = None
    """Of the base's chat template and tokenizer, under which every job here trains; set by who has the tokenizer."""
    longest: float = 0.0
    """Seconds of the slowest one."""
    num_bytes: int = 0
    """Bytes of weights copied, over all publishes."""
    took: Tally = field(default_factory=lambda: Tally(SECONDS))
    """Seconds of each publish."""
    _behind: set[int] = field(default_factory=set)
    """Jobs whose newest weights found no room to be published."""

    @property
    def count(self) -> int:
        """How many versions were published."""
        return sum(self.took.counts)

    def publish(self, job: FinetuneJob, weights: Tensor | None = None, step: int | None = None) -> None:
        """A new served version of the weights in training, or of those given: one copy, then the name moves.

        Args:
            weights: flat master weights ``[num_elements]`` in slot layout, float32, on any device: those of `step`.

        Raises:
            OutOfAdapterMemoryError: there is no room; nothing changed.
        """
        self.fail_point("job.before_publish")
        started = time.perf_counter()
        slot = self.arena.allocate(self.arena.modules(job.slot), zeroed=False)
        if weights is None:
            self.arena.copy(job.slot, slot)
        else:
            self.arena.flat(slot).copy_(weights)
            self.arena.refresh(slot)
        self._serve(job, slot, job.num_steps if step is None else step)
        if weights is None:
            self._behind.discard(job.job_id)
        self.admission.published(job)
        seconds = time.perf_counter() - started
        self.longest = max(self.longest, seconds)
        self.took.add(seconds)
        self.num_bytes += self.arena.slot_bytes(slot)

    def publish_if_room(self, job: FinetuneJob) -> None:
        """`publish`; without room training goes on and the old version keeps serving.

        The last weights are never lost: when the job ends, its own slot becomes the version (`take_slot`).
        """
        try:
            self.publish(job)
        except OutOfAdapterMemoryError as error:
            log.warning("step %d of %s is not published: %s", job.num_steps, job.name, error)
            self._behind.add(job.job_id)

    def take_slot(self, job: FinetuneJob) -> bool:
        """Serve an ended job's own slot when its last weights never found room. False: the slot is nobody's now."""
        behind = job.job_id in self._behind
        self._behind.discard(job.job_id)
        if not behind or job.status is not JobStatus.SUCCEEDED:
            return False
        self._serve(job, job.slot, job.num_steps)
        return True

    def _serve(self, job: FinetuneJob, slot: int, step: int) -> None:
        version = self.residency.publish(job.name, slot, job.spec, self.template_fingerprint)
        job.versions[step] = version.number
