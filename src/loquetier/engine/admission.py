"""Which jobs have memory and which wait for it. Engine thread only.

Jobs wait in the order they came, and only the first is looked at: none overtakes it, so none starves. A job that runs
never waits for memory, and one that waits holds none, so nothing can wait in a circle; adapters may be loaded and
unloaded meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import Tensor

from loquetier.adapters.spec import AdapterSpec, ModulePlan, resolve_modules
from loquetier.base.model import Base
from loquetier.config import EngineConfig, TrainingConfig
from loquetier.engine.hold import Hold, HoldState
from loquetier.engine.residency import Residency
from loquetier.engine.trainer import Trainer
from loquetier.errors import IntegrityError, OutOfAdapterMemoryError, OutOfTrainMemoryError
from loquetier.training.example import Example
from loquetier.training.job import FinetuneJob, JobImage
from loquetier.training.memory import MemoryModel, MemoryNeeds
from loquetier.training.optimizer import check_ratio

ITS_TURN = "waits for its turn"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """A job that is ready to run but for its memory."""

    job: FinetuneJob
    modules: tuple[ModulePlan, ...]
    needs: MemoryNeeds
    source: Hold | None = None
    """It continues from this version, which stays resident until it has."""
    image: JobImage | None = None
    """It goes on from this state."""
    catches_up: bool = False
    """The state is a checkpoint's: what its last step still owes is made up for."""
    served: tuple[Tensor, int] | None = None
    """With a checkpoint: weights of an earlier step that were served, and that step."""


@dataclass(slots=True)
class Admission:
    """The queue, what the running jobs take, and what is left."""

    trainer: Trainer
    residency: Residency
    model: MemoryModel
    """What training takes on this base with these settings."""
    tell: Callable[[FinetuneJob], None] = lambda job: None
    """Told of a job that waits for another reason than before."""
    _queue: list[Ticket] = field(default_factory=list)
    _parked: dict[int, Ticket] = field(default_factory=dict)
    """Paused before they had memory."""
    _admitted: dict[int, MemoryNeeds] = field(default_factory=dict)
    _unpublished: set[int] = field(default_factory=set)
    """Admitted jobs whose first version has no slot yet."""
    _state_bytes: int = 0
    _frees_seen: int = 0
    _has_news: bool = False

    @property
    def may_admit(self) -> bool:
        """Something changed since the first in the queue was found not to fit."""
        return bool(self._queue) and (self._has_news or self._frees_seen != self.trainer.arena.num_frees)

    def graph_bytes(self, rows: int) -> int:
        """What training takes of `train_memory` with a graph tape of so many rows."""
        needs = self._admitted.values()
        trained = frozenset[int]().union(*(n.trained for n in needs))
        kept, labels = max((n.kept for n in needs), default=0), sum(n.labels for n in needs)
        # Another job may evaluate while the tape is open.
        evaluation = max((n.estimate.evaluation for n in needs), default=0) if len(needs) > 1 else 0
        return self._state_bytes + evaluation + self.model.activations("graph", rows, labels, trained, kept)

    @property
    def num_pinned(self) -> int:
        """Uses of adapter versions by jobs that wait to continue from them."""
        return sum(t.source is not None for t in (*self._queue, *self._parked.values()))

    def check_settings(self, name: str, spec: AdapterSpec, config: TrainingConfig, *, saves: bool) -> None:
        """Refuse a job that would be refused with any data; it is tried with two tokens. Any thread.

        Raises:
            AdapterMismatchError, ConfigError, OutOfAdapterMemoryError, OutOfTrainMemoryError: as when it is started.
        """
        modules = resolve_modules(spec, self.trainer.base.targets)
        check_ratio(config, modules)
        least = Example(tokens=(0, 0), learn=(True, True))
        self._check_fits(name, self.model.needs(config, modules, (least,), (), saves=saves))

    def check_possible(self, ticket: Ticket) -> None:
        """Whether the job would fit if it were alone.

        Raises:
            OutOfAdapterMemoryError, OutOfTrainMemoryError: it would not, with the numbers and the ways out.
        """
        source = 0 if ticket.source is None else ticket.source.version.num_bytes
        self._check_fits(ticket.job.name, ticket.needs, source)

    def _check_fits(self, name: str, needs: MemoryNeeds, source: int = 0) -> None:
        """`source`: bytes of the version that it continues from."""
        arena, estimate = self.trainer.arena, needs.estimate
        if estimate.arena + source > arena.total_bytes:
            raise OutOfAdapterMemoryError(
                f"job {name!r} needs {_mib(estimate.arena + source)} of adapter memory "
                f"({_mib(estimate.slot)} to train in, {_mib(estimate.published + estimate.publishing)} to publish to, "
                f"{_mib(source)} to continue from), more than the arena has when all of it is free: "
                f"adapter_memory={arena.total_bytes} ({_mib(arena.total_bytes)}). Lower r, choose fewer "
                "target_modules, publish at the end only, or raise adapter_memory."
            )
        limit = self.model.train_memory
        if limit is not None and self.model.smallest(needs) > limit:
            raise OutOfTrainMemoryError(
                f"job {name!r} needs {_mib(self.model.smallest(needs))} to train even alone, more "
                f"than train_memory={limit} ({_mib(limit)}): {_mib(estimate.state)} for its state, the rest for a "
                f"tape of {estimate.rows} rows (the longest example has {needs.longest}). Lower "
                "max_train_rows, max_seq_len, batch_size or r, choose fewer target_modules, or raise train_memory."
            )

    def enter(self, ticket: Ticket) -> None:
        """Queue it at its place: that of its arrival, also when it was paused meanwhile."""
        self._parked.pop(ticket.job.job_id, None)
        self._queue.append(ticket)
        self._queue.sort(key=lambda t: t.job.job_id)
        self._has_news = True
        self._renumber()

    def park(self, ticket: Ticket) -> None:
        """Keep it, out of the queue."""
        self._parked[ticket.job.job_id] = ticket

    def pause(self, job: FinetuneJob) -> None:
        """A queued job was paused."""
        ticket = next(t for t in self._queue if t.job is job)
        self._remove(ticket)
        self.park(ticket)

    def resume(self, job: FinetuneJob) -> None:
        """A job that was paused before it had memory queues again."""
        self.enter(self._parked[job.job_id])

    def forget(self, job: FinetuneJob) -> None:
        """A job without memory has ended."""
        parked = self._parked.pop(job.job_id, None)
        ticket = parked or next((t for t in self._queue if t.job is job), None)
        if ticket in self._queue:
            self._remove(ticket)
        if ticket is not None and ticket.source is not None:
            self.residency.drop(ticket.source)

    def take(self) -> tuple[Ticket, int] | None:
        """The first of the queue and its new slot, if it fits now; its version to continue from is the caller's."""
        if not self.may_admit:
            return None
        self._has_news, self._frees_seen = False, self.trainer.arena.num_frees
        ticket = self._queue[0]
        short = self._shortage(ticket)
        if short is None:
            try:
                slot = self.trainer.arena.allocate(ticket.modules)
            except OutOfAdapterMemoryError as error:  # enough bytes, but not in one piece
                short = f"waits for adapter memory: {error}"
            else:
                self._remove(ticket)
                self._admitted[ticket.job.job_id] = ticket.needs
                self._unpublished.add(ticket.job.job_id)
                self._state_bytes += ticket.needs.estimate.state
                return ticket, slot
        if ticket.job.reason != short:
            ticket.job.reason = short
            self.tell(ticket.job)
        return None

    def published(self, job: FinetuneJob) -> None:
        """Its newest version has a slot."""
        self._unpublished.discard(job.job_id)

    def release(self, job: FinetuneJob) -> None:
        """A job with memory has given it back."""
        self._state_bytes -= self._admitted.pop(job.job_id).estimate.state
        self._unpublished.discard(job.job_id)
        self._has_news = True
        self.residency.look_again()  # what was kept for it to publish to is anybody's

    def _remove(self, ticket: Ticket) -> None:
        # What comes after it may fit where it did not.
        self._has_news = True
        self.residency.want_room(0)
        self._queue = [t for t in self._queue if t is not ticket]
        ticket.job.position = None
        self._renumber()

    def _renumber(self) -> None:
        for place, ticket in enumerate(self._queue, 1):
            ticket.job.position = place
            if ticket.job.reason is None:
                ticket.job.reason = ITS_TURN

    def _shortage(self, ticket: Ticket) -> str | None:
        """What it still waits for; None when it fits."""
        arena, needs = self.trainer.arena, ticket.needs
        wanted = needs.estimate.slot + self._reserved((*self._admitted.values(), needs), needs.estimate.published)
        if ticket.source is not None and ticket.source.state is not HoldState.HELD:
            return f"waits for {ticket.source.version.label}, which it continues from, to be loaded"
        is_short = arena.free_bytes + self.residency.reclaimable_bytes < wanted
        self.residency.want_room(wanted if is_short else 0)
        if is_short:
            return (
                f"waits for adapter memory: with what the jobs before it will publish to, {_mib(wanted)} are needed, "
                f"and {_mib(arena.free_bytes)} of {_mib(arena.total_bytes)} are free"
            )
        while arena.free_bytes < wanted and self.residency.reclaim_one():
            pass
        limit = self.model.train_memory
        if limit is None:
            return None
        wanted = self.model.smallest(needs, self._admitted.values())
        if wanted <= limit:
            return None
        return (
            f"waits for training memory: with the jobs that run, {_mib(wanted)} are needed, and train_memory is "
            f"{_mib(limit)}"
        )

    @property
    def reserved_bytes(self) -> int:
        """Bytes that the running jobs will publish to, and no adapter that is only served may take for good."""
        return self._reserved(self._admitted.values(), 0) if self._admitted else 0

    def look_again(self) -> None:
        """What the first in the queue waited for may have come."""
        self._has_news = True

    def _reserved(self, running: Iterable[MemoryNeeds], own: int) -> int:
        """Bytes that must stay free to publish to: each job's first version, and one more to replace one."""
        first = own + sum(self._admitted[i].estimate.published for i in self._unpublished)
        return first + max(needs.estimate.publishing for needs in running)

    def check_integrity(self) -> None:
        """Every job with memory is counted, and no other. Raises IntegrityError."""
        held = {i for i, job in self.trainer.jobs.items() if job.has_memory}
        state = sum(needs.estimate.state for needs in self._admitted.values())
        if held != self._admitted.keys() or state != self._state_bytes:
            raise IntegrityError(
                f"jobs {sorted(held)} have memory, {sorted(self._admitted)} are counted; {state} and "
                f"{self._state_bytes} bytes"
            )


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.1f} MiB"


def memory_model(base: Base, config: EngineConfig, factor_itemsize: int) -> MemoryModel:
    """What training takes on this base with these settings."""
    is_capped = getattr(base.config, "attn_logit_softcapping", None) is not None
    return MemoryModel(
        layers=base.footprints,
        hidden=int(base.config.hidden_size),
        kv=2 * base.kv_heads * base.head_dim,
        head_dim=base.head_dim,
        vocab=base.vocab_size,
        score=16 * int(base.config.num_attention_heads) if is_capped else 1,
        itemsize=base.dtype.itemsize,
        factor_itemsize=factor_itemsize,
        layer_of={t.index: t.layer for t in base.targets if t.layer is not None},
        tape=None if config.tape == "auto" else config.tape,
        train_memory=config.train_memory,
        max_train_rows=min(config.max_train_rows, config.max_rows),
        window=config.train_window,
        is_fused=base.fused is not None,
        gates_in_kernels=base.gates_in_kernels and base.train_stack is None,
        has_plain_head=base.frozen_head is not None,
        host_is_device=base.device.type == "cpu",
    )
