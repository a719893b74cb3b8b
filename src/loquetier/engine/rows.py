"""What one step works on: sequences, training items and the plan. Plain data, no torch, imports nothing of ours.

A *row* is one token of the step's flat batch. A *segment* is a run of rows of one kind and one adapter
version. Rows are ordered [TRAIN | EVAL | PREFILL | DECODE], inside a kind by adapter slot, so that each
adapter's rows are contiguous per kind and the rows that need gradients are exactly ``[0, T)``.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

BASE_SLOT = -1
"""Slot number of rows that run on the bare base model: they have no LoRA cost."""


TapeKind = Literal["graph", "replay"]
"""What a training forward keeps for its backward: every layer's graph, or layer inputs, K and V to run layers again."""
REPLAY_COST = 2
"""Work of a row in a unit of the replay tape against the graph tape's: the layer's forward runs again."""


class RowKind(enum.IntEnum):
    """The four kinds of rows, in batch order."""

    TRAIN = 0
    EVAL = 1
    PREFILL = 2
    DECODE = 3


class SequenceStatus(enum.Enum):
    """Where a sequence is in its life. FINISHED and ABORTED are final."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    ABORTED = "aborted"


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice of one request: tokens known so far, and how many of them are in the KV cache.

    There is no prefill or decode phase: a sequence with more than one token left to compute gets PREFILL
    rows, one with exactly one left gets a DECODE row. Preemption sets ``num_computed`` back to 0.
    """

    seq_id: int
    """Unique inside one engine, never reused; also the arrival order."""
    tokens: list[int]
    """Prompt, then generated tokens."""
    prompt_len: int
    """Number of prompt tokens at the start of `tokens`."""
    max_total_len: int
    """Prompt plus the most tokens that may be generated; at most the model's context."""
    slot: int = BASE_SLOT
    """Arena slot of the adapter version this sequence runs on for all its life."""
    priority: int = 0
    """Lower runs earlier, as in vLLM; ties by arrival."""
    num_computed: int = 0
    """Tokens whose K and V are in the cache."""
    pages: list[int] = field(default_factory=list)
    """KV pages owned, in sequence order."""
    status: SequenceStatus = SequenceStatus.WAITING
    num_preemptions: int = 0
    num_pending: int = 0
    """Tokens sampled by steps whose outcome the host does not know yet: 0 or 1 when a step is planned."""
    needs_host: bool = False
    """No row while a token is pending: its next one depends on it in a way that only the host knows (a grammar)."""
    needs_prompt_logits: bool = False
    """True when every prompt row's logits are wanted (prompt logprobs)."""
    cache_root: bytes | None = None
    """Where the keys of its pages begin; None = it shares no page with others. See `engine.prefix`."""
    page_keys: list[bytes] = field(default_factory=list)
    """Keys of its full pages, as far as they were made."""
    num_offered: int = 0
    """Pages of its beginning that others were offered, or that it was given."""
    num_cached: int | None = None
    """Tokens found in the prefix cache when it was first admitted; None before, and when it shares nothing."""

    @property
    def num_left(self) -> int:
        """Tokens whose K and V are still to be computed, pending ones included."""
        return len(self.tokens) + self.num_pending - self.num_computed

    @property
    def num_generated(self) -> int:
        """Tokens sampled so far that the host knows."""
        return len(self.tokens) - self.prompt_len

    @property
    def num_sampled(self) -> int:
        """Tokens sampled so far, pending ones included."""
        return self.num_generated + self.num_pending

    @property
    def may_go_on(self) -> bool:
        """False while a pending token decides what comes next: it is the last one, or the host must see it."""
        if self.num_pending == 0:
            return True
        return not self.needs_host and len(self.tokens) + self.num_pending < self.max_total_len


@dataclass(frozen=True, slots=True)
class TrainItem:
    """One example (or evaluation example) of a job, or a window of its rows. The tokens stay with the job."""

    job_id: int
    item_id: int
    """Unique inside the job; the job finds tokens and weights by it."""
    num_rows: int
    """Rows it takes: one per input token."""
    slot: int
    """The job's training slot."""
    start: int = 0
    """First row inside the example; above 0, or with fewer rows than the example has, it is a window."""


def cut_rows(items: Iterable[TrainItem], start: int, stop: int) -> tuple[TrainItem, ...]:
    """Rows ``[start, stop)`` of items laid end to end, as windows of the items that they belong to."""
    windows, at = [], 0
    for item in items:
        first, last = max(start, at), min(stop, at + item.num_rows)
        if first < last:
            windows.append(replace(item, start=item.start + first - at, num_rows=last - first))
        at += item.num_rows
    return tuple(windows)


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Tokens ``[start, start + length)`` of a sequence, to be computed in this step."""

    seq: Sequence
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What the scheduler decided for one step. The engine executes it as it stands."""

    train: tuple[TrainItem, ...] = ()
    """The TRAIN rows of this step: whole items, or windows of them, in the order of the open tape's rows."""
    opened: tuple[TrainItem, ...] = ()
    """The items, whole, for which this step opens a tape; `train` is its first rows. Empty when `train` goes on with
    the tape that is open."""
    evaluate: tuple[TrainItem, ...] = ()
    prefill: tuple[PrefillChunk, ...] = ()
    decode: tuple[Sequence, ...] = ()
    backward_units: int = 0
    """How many units of the open tape may run in this step, at most (the tape opened by this step's own
    TRAIN rows included)."""
    tape: TapeKind = "graph"
    """The tape that `opened` is for."""
    preempted: tuple[Sequence, ...] = ()
    """Sequences that lost their pages while planning; already back in the waiting queue."""

    @property
    def num_rows(self) -> int:
        """Rows of the flat batch."""
        return (
            sum(i.num_rows for i in self.train)
            + sum(i.num_rows for i in self.evaluate)
            + sum(c.length for c in self.prefill)
            + len(self.decode)
        )

    @property
    def is_empty(self) -> bool:
        """True when the step would neither run rows nor backward units."""
        return self.num_rows == 0 and self.backward_units == 0
