"""What training takes, in bytes, before a tensor of it exists: pure functions of shapes, settings and data.

A job's state (its slot, gradient, moments, data) is there as long as it runs; one tape is open at a time, so of the
activations of all jobs only the largest tape counts. Compared with measured peaks in ``tests/parity/test_memory.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from loquetier.adapters.arena import num_elements, slot_elements
from loquetier.adapters.methods import slot_method
from loquetier.adapters.spec import ModulePlan
from loquetier.base.footprint import LayerFootprint
from loquetier.config import TrainingConfig
from loquetier.engine.rows import TapeKind
from loquetier.training.example import Example
from loquetier.training.loss import CHUNK_ROWS

_FLOAT = 4
_TOKEN = 8 + 32 + 8
"""Bytes of one encoded token: two entries of tuples, and one int of CPython's."""
_LABEL = 16
"""Its row and target, as int64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Bytes of one job that runs alone. Printed before its first step."""

    slot: int
    """Arena: the weights in training."""
    published: int
    """Arena: the version that it serves."""
    publishing: int
    """Arena: one more while a new version replaces the one before."""
    master: int
    """float32 weights; 0 where the slot itself is float32."""
    gradient: int
    moments: int
    checkpoint: int
    """Copies on their way to the disk: one being written with its serialized form, and one that waits."""
    data: int
    """Encoded examples."""
    activations: int
    """Peak of the largest tape."""
    loss: int
    """Logits of one chunk and their gradient; part of the peak where the loss is its highest point."""
    evaluation: int
    """Peak of its largest step of EVAL rows; its own tape is closed by then."""
    tape: TapeKind
    """The tape that `activations` counts: the one that the settings name, or "auto" chooses without traffic."""
    rows: int
    """TRAIN rows of the largest tape."""

    @property
    def arena(self) -> int:
        """Of `adapter_memory`."""
        return self.slot + self.published + self.publishing

    @property
    def state(self) -> int:
        """Of `train_memory`, as long as the job runs or is paused."""
        return self.master + self.gradient + self.moments + self.checkpoint + self.data

    @property
    def training(self) -> int:
        """Of `train_memory`, at the peak."""
        return self.state + max(self.activations, self.evaluation)

    def table(self) -> str:
        """The numbers, a line each, in MiB."""
        parts = ("slot", "published", "publishing", "master", "gradient", "moments", "checkpoint", "data")
        lines = [(name, getattr(self, name)) for name in parts]
        lines.append((f"activations ({self.tape} tape, {self.rows} rows)", self.activations))
        if self.evaluation:
            lines.append(("evaluation, in place of them", self.evaluation))
        lines += [("of adapter_memory", self.arena), ("of train_memory", self.training)]
        return "\n".join(f"  {name:<42}{size / (1 << 20):>10.2f} MiB" for name, size in lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryNeeds:
    """What of a job decides how much it takes beside others."""

    estimate: MemoryEstimate
    trained: frozenset[int]
    """Indices of its modules."""
    kept: int
    """Floats per TRAIN row that its method keeps on a graph tape, beside what the base keeps."""
    sizes: tuple[int, ...]
    """Rows of the examples of its largest optimizer step, descending."""
    labels: int
    """Labelled rows of that step."""

    @property
    def longest(self) -> int:
        """Rows of its longest example."""
        return self.sizes[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryModel:
    """The shapes of a base and the settings of an engine."""

    layers: tuple[LayerFootprint, ...]
    hidden: int
    kv: int
    """Floats of K and V of one row and layer together."""
    head_dim: int
    vocab: int
    score: int
    """Bytes of a row and a row that it attends to: soft-capped scores are written out, of others there is the mask."""
    itemsize: int
    """Bytes of an activation."""
    factor_itemsize: int
    """Bytes of a weight in the arena."""
    layer_of: dict[int, int]
    """Module index -> layer; lm_head is in none."""
    tape: TapeKind | None
    """None = whichever fits."""
    train_memory: int | None
    max_train_rows: int
    window: int
    is_fused: bool
    """Steps without TRAIN rows run the fused stack, which holds one MLP temporary less."""
    gates_in_kernels: bool
    """So do the model's own layers, because their gated activations are one kernel each."""
    has_plain_head: bool
    """Losses take one `PlainHead`: the logits only, whose gradient lies in their place."""
    host_is_device: bool
    """False where data and checkpoints lie in other memory than the tapes."""

    def needs(
        self,
        config: TrainingConfig,
        modules: tuple[ModulePlan, ...],
        examples: Sequence[Example],
        eval_examples: Sequence[Example],
        *,
        saves: bool,
    ) -> MemoryNeeds:
        """A job's needs. `saves`: it makes checkpoints."""
        per_step = config.batch_size * config.gradient_accumulation_steps
        by_length = sorted(examples, key=lambda e: -e.num_rows)[:per_step]
        sizes = tuple(e.num_rows for e in by_length)
        labels = sum(sorted((e.num_labels for e in examples), reverse=True)[:per_step])
        trained = frozenset(m.target.index for m in modules)
        slot = slot_elements(modules) * self.factor_itemsize
        flat = num_elements(modules) * _FLOAT
        steps = config.max_steps or config.num_epochs * -(-len(examples) // per_step)
        replaces = config.publish != "end" and steps > 1
        every = (*examples, *eval_examples)
        state = {
            "master": 0 if self.factor_itemsize == _FLOAT else flat,
            "gradient": flat,
            "moments": 2 * flat,
            # Weights, gradient and two moments twice; the serialized form of all but the weights once.
            "checkpoint": (8 + 3) * flat if saves and self.host_is_device else 0,
            "data": sum(len(e.tokens) * _TOKEN + e.num_labels * _LABEL for e in every) * self.host_is_device,
        }
        rows = largest_fill(sizes, self.max_train_rows)
        kept = sum(slot_method(modules).kept_per_row(m) for m in modules)
        tape = self.tape or self._auto(rows, labels, trained, kept, sum(state.values()))
        estimate = MemoryEstimate(
            slot=slot,
            published=slot,
            publishing=slot * replaces,
            activations=self.activations(tape, rows, labels, trained, kept),
            loss=self._loss(min(rows, labels, self.max_train_rows), trained),
            evaluation=self.evaluation(eval_examples, trained),
            tape=tape,
            rows=rows,
            **state,
        )
        return MemoryNeeds(estimate=estimate, trained=trained, kept=kept, sizes=sizes, labels=labels)

    def smallest(self, needs: MemoryNeeds, others: Iterable[MemoryNeeds] = ()) -> int:
        """Bytes of `train_memory` that this job and the others take together, on the smaller tape if there is a choice.

        Their rows may share one tape, and one of them may evaluate while it is open.
        """
        jobs = (needs, *others)
        sizes = sorted((size for n in jobs for size in n.sizes), reverse=True)
        rows, labels = largest_fill(sizes, self.max_train_rows), sum(n.labels for n in jobs)
        trained = frozenset().union(*(n.trained for n in jobs))
        kinds: tuple[TapeKind, ...] = ("graph", "replay") if self.tape is None else (self.tape,)
        kept = max(n.kept for n in jobs)
        least = min(self.activations(kind, rows, labels, trained, kept) for kind in kinds)
        evaluation = max(n.estimate.evaluation for n in jobs)
        peak = max(least, evaluation) if len(jobs) == 1 else least + evaluation
        return sum(n.estimate.state for n in jobs) + peak

    def evaluation(self, examples: Sequence[Example], trained: frozenset[int]) -> int:
        """Peak bytes of the largest step of EVAL rows of these examples: a forward of which nothing is kept.

        `trained`: the modules of the adapter that they run on.
        """
        rows = largest_fill(sorted((e.num_rows for e in examples), reverse=True), self.max_train_rows)
        mlp = (3 if self.is_fused or self.gates_in_kernels else 4) * max(layer.mlp for layer in self.layers)
        forward = rows * ((mlp + 4 * self.hidden + 2 * self.head_dim) * self.itemsize + rows * (self.score // 2))
        loss = rows * 2 * self.hidden * self.itemsize + self._loss(
            min(rows, sum(e.num_labels for e in examples)), trained, with_grad=False
        )
        return max(forward, loss) if rows else 0

    def activations(self, tape: TapeKind, rows: int, labels: int, trained: frozenset[int], kept: int) -> int:
        """Peak bytes of one tape with so many TRAIN rows, from its forward to its last unit."""
        in_layers = [self.layer_of[m] for m in trained if m in self.layer_of]
        layers = self.layers[min(in_layers, default=len(self.layers)) :]
        size, hidden_bytes = self.itemsize, self.hidden * self.itemsize
        once = 2 * self.head_dim * size  # cos and sin
        graph = [layer.kept(trained) * size for layer in layers]
        # Gate and up, activation, product; a kernel makes the product at once.
        forward = (3 if self.gates_in_kernels else 4) * max(layer.mlp for layer in self.layers) * size
        at_once = rows if tape == "graph" else min(rows, self.max_train_rows)  # of the forward
        loss = hidden_bytes * rows + self._loss(min(at_once, labels), trained)
        if tape == "graph":
            # Half of what is written for a score is kept: its tanh and its probability.
            scores = rows * rows * (self.score // 2)
            tape_bytes = rows * (sum(graph) + kept * size + once) + len(layers) * scores
            return tape_bytes + max(rows * (hidden_bytes + self._backward) + scores // 2, loss, rows * forward)
        window = min(self.window, rows)
        inputs = rows * (len(layers) * (self.hidden + self.kv) * size + once + 2 * hidden_bytes)
        own = max(graph, default=0) + kept * size // max(1, len(layers))
        unit = window * (own + self._backward + rows * self.score)
        forward += rows * self.score // 2
        # K and V of the whole example for its last window's attention, and the float32 gradients of those before.
        past = self.kv * (rows * size + (rows - window) * _FLOAT)
        return inputs + max(at_once * forward, loss, rows * hidden_bytes + unit + past)

    @property
    def _backward(self) -> int:
        """Bytes per row of a unit's temporaries: of the gated activation, or (float32 factors) of down_proj."""
        mlp = max(layer.mlp for layer in self.layers)
        if self.itemsize == _FLOAT:
            return 4 * mlp * _FLOAT
        return max(4 * mlp * self.itemsize, mlp * (2 * self.itemsize + 2 * _FLOAT) + self.hidden * _FLOAT)

    def _loss(self, labels: int, trained: frozenset[int], *, with_grad: bool = True) -> int:
        """Bytes of one chunk: its hidden states and their gradient, its logits, their exponentials and gradient."""
        logits = 2 * _FLOAT if self.itemsize == _FLOAT else 2 * _FLOAT + (1 + with_grad) * self.itemsize
        if self.has_plain_head and trained <= self.layer_of.keys():  # no adapter on the head
            logits = self.itemsize
        return min(CHUNK_ROWS, labels) * (self.vocab * logits + 2 * self.hidden * self.itemsize)

    def _auto(self, rows: int, labels: int, trained: frozenset[int], kept: int, state: int) -> TapeKind:
        if self.train_memory is None:
            return "graph"
        peak = state + self.activations("graph", rows, labels, trained, kept)
        return "graph" if peak <= self.train_memory else "replay"


def largest_fill(sizes: Iterable[int], most: int) -> int:
    """Rows of the largest tape of whole examples (sizes descending): as full as they go, or one that exceeds `most`."""
    filled = 0
    for size in sizes:
        if not filled and size >= most:
            return size
        if filled + size <= most:
            filled += size
    return filled
