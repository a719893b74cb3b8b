"""Engines on tiny models without a disk, every logit that they compute, and Hugging Face and PEFT as the oracle."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from loquetier.adapters.peft_io import read_adapter
from loquetier.base.context import StepContext
from loquetier.base.loading import LoadedBase
from loquetier.base.model import Base
from loquetier.config import MIB, EngineConfig, Hardware, SamplingParams, resolve
from loquetier.engine.batch import head_step
from loquetier.engine.engine import Engine
from loquetier.engine.request import TokenEvent
from loquetier.engine.rows import Sequence, StepPlan
from loquetier.errors import LoquetierError

BASE_NAME = "tiny"
FP32_TOLERANCE = 1e-4
"""Max abs error of a float32 logit against Hugging Face or PEFT, over the whole vocabulary.

Logits of the tiny models are units to tens, and float32 rounds at 6e-8 of that per operation; the order of additions
in a few hundred of them differs between one GEMM over all rows and one per sequence. Wrong masks, rows, positions or
scales show as errors of 0.1 to 10.
"""
_MACHINE = Hardware(has_cuda=False, cpu_bf16_fast=False, free_memory=1 << 30)

EngineFactory = Callable[..., Engine]


@pytest.fixture
def new_engine() -> Iterator[EngineFactory]:
    """`make_engine`; when the test is over, the books of every engine that it made must add up and be at rest."""
    made: list[Engine] = []

    def factory(model: Any, **settings: Any) -> Engine:
        made.append(make_engine(model, **settings))
        return made[-1]

    yield factory
    for engine in made:
        engine.check_integrity()
        if not engine.has_work:
            assert engine.scheduler.pages.num_available == engine.allocator.num_pages
            assert not engine.serving.requests and not engine.serving.choices


def make_engine(
    model: Any, *, tokenizer: Any = None, eos_token_ids: frozenset[int] = frozenset(), **settings: Any
) -> Engine:
    """An engine on a deep copy of `model`; `settings` go to EngineConfig. No end tokens unless they are given."""
    limits = {"kv_memory": 4 * MIB, "adapter_memory": 8 * MIB, "device": "cpu"} | settings
    limits["dtype"] = str(model.dtype).removeprefix("torch.")
    copied = copy.deepcopy(model).eval().requires_grad_(False)
    parameters = list(copied.parameters())
    loaded = LoadedBase(
        model=copied,
        tokenizer=tokenizer,
        name=BASE_NAME,
        source=Path("."),
        max_context=getattr(model.config, "max_position_embeddings", 256),
        eos_token_ids=eos_token_ids,
        num_parameters=sum(p.numel() for p in parameters),
        weight_bytes=sum(p.numel() * p.element_size() for p in parameters),
    )
    return Engine(Base(loaded), resolve(EngineConfig(**limits), _MACHINE))


# --- requests ---


@dataclass
class Answer:
    """What one request was told, by choice."""

    events: list[TokenEvent] = field(default_factory=list)
    request_id: int = -1

    def of(self, index: int = 0) -> list[TokenEvent]:
        return [e for e in self.events if e.index == index]

    def tokens(self, index: int = 0) -> list[int]:
        """Generated tokens; fails if the choice failed, so that no test compares an error's empty answer."""
        assert self.error(index) is None, self.error(index)
        return [e.token_id for e in self.of(index) if e.token_id is not None]

    def text(self, index: int = 0) -> str:
        return "".join(e.text for e in self.of(index))

    def reason(self, index: int = 0) -> str | None:
        return self.of(index)[-1].finish_reason if self.of(index) else None

    def error(self, index: int = 0) -> LoquetierError | None:
        return self.of(index)[-1].error if self.of(index) else None


def ask(engine: Engine, prompt: list[int], model: str = BASE_NAME, **params: Any) -> Answer:
    """Queue a request, greedy unless told otherwise."""
    answer = Answer()
    settings = {"temperature": 0.0, "max_tokens": 8} | params
    answer.request_id = engine.add_request(prompt, model, SamplingParams(**settings), answer.events.append).request_id
    return answer


def run(engine: Engine, max_steps: int = 2000) -> int:
    """Step until nothing is left, checking the books after each step; returns the number of steps."""
    for number in range(max_steps):
        if not engine.has_work:
            return number
        engine.step()
        engine.check_integrity()
    raise AssertionError(f"still working after {max_steps} steps")


def prompt_of(length: int, seed: int, vocab: int = 300) -> list[int]:
    """Random token ids, no special ones."""
    return torch.randint(4, vocab, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


# --- what the engine computed ---


class LogitRecorder:
    """Keeps the logits of every PREFILL and DECODE row of every step, by sequence and position.

    It stands between the engine and two public calls (`Scheduler.schedule`, `Base.hidden`) and changes neither.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._schedule, self._hidden = engine.scheduler.schedule, engine.base.hidden
        self._plan = StepPlan()
        self._sequences: dict[int, Sequence] = {}
        self._rows: dict[int, dict[int, Tensor]] = {}
        self.plans: list[StepPlan] = []
        engine.scheduler.schedule = self._watch_schedule  # type: ignore[method-assign]
        engine.base.hidden = self._watch_hidden  # type: ignore[method-assign]

    def _watch_schedule(self, *args: Any, **kwargs: Any) -> StepPlan:
        self._plan = self._schedule(*args, **kwargs)
        self.plans.append(self._plan)
        return self._plan

    def _watch_hidden(self, ids_M: Tensor, positions_M: Tensor, step: StepContext) -> Tensor:
        hidden_MD = self._hidden(ids_M, positions_M, step)
        rows = np.arange(step.cache_start, step.num_rows)
        if len(rows):
            with torch.no_grad():
                head = head_step(step, rows, self._engine.serving.head_module, with_grad=False)
                self._keep(self._engine.base.logits(hidden_MD.detach()[step.cache_start :], head))
        return hidden_MD

    def _keep(self, logits_NV: Tensor) -> None:
        where = [(c.seq, c.start + i) for c in self._plan.prefill for i in range(c.length)]
        where += [(seq, seq.num_computed) for seq in self._plan.decode]
        for (seq, position), logits_V in zip(where, logits_NV, strict=True):
            self._sequences[seq.seq_id] = seq
            self._rows.setdefault(seq.seq_id, {})[position] = logits_V.float().clone()

    def results(self) -> list[tuple[Sequence, Tensor]]:
        """Every sequence that ran, in order of arrival, with its logits ``[tokens but the last generated, V]``."""
        found = []
        for seq_id in sorted(self._sequences):
            rows = self._rows[seq_id]
            found.append((self._sequences[seq_id], torch.stack([rows[i] for i in range(len(rows))])))
        return found

    def saw(self, **kinds: bool) -> bool:
        """True when some step had (or had not) rows of each kind named: train, evaluate, prefill, decode."""
        return any(all(bool(getattr(p, k)) is wanted for k, wanted in kinds.items()) for p in self.plans)


# --- the oracle ---


@torch.no_grad()
def reference_logits(model: nn.Module, tokens: list[int]) -> Tensor:
    """Logits ``[len(tokens), V]`` in float32 of one sequence alone, no cache, eager attention."""
    model.set_attn_implementation("eager")  # SDPA has no softcap in transformers
    logits_TV: Tensor = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].float()
    return logits_TV


def peft_model(model: Any, seed: int, *, std: float = 0.1, **settings: Any) -> Any:
    """Stock PEFT on a deep copy of `model`, with random A and B so that the adapter matters."""
    peft = get_peft_model(copy.deepcopy(model), LoraConfig(**({"task_type": "CAUSAL_LM"} | settings))).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return peft


def load_peft(engine: Engine, name: str, peft: Any, directory: Path) -> None:
    """Save with PEFT, read with ours, serve as `name`."""
    peft.save_pretrained(directory, save_embedding_layers=False)
    weights = read_adapter(directory, engine.base.targets)
    engine.adapters.load(name, weights.spec, weights.modules, weights.factors)


def max_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference; shapes must agree and everything be finite."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    assert torch.isfinite(ours).all() and torch.isfinite(theirs).all()
    return float((ours - theirs).abs().max())
