"""Our engine and plain PEFT + torch on the same tiny model, data and initial weights."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from tests.tiny import EOS, VOCAB, tiny_model, tiny_tokenizer
from torch import Tensor
from torch.nn import functional as F

from loquetier.adapters.spec import LoraSpec, resolve_modules
from loquetier.base.loading import LoadedBase
from loquetier.base.model import Base
from loquetier.config import MIB, EngineConfig, SamplingParams, TrainingConfig
from loquetier.engine.engine import Engine
from loquetier.engine.request import TokenEvent
from loquetier.training.data import Example, batches
from loquetier.training.job import FinetuneJob, StepRecord

Factors = dict[str, tuple[Tensor, Tensor]]
"""Path -> (A ``[r, in]``, B ``[out, r]``): PEFT's orientation."""
BASE_NAME = "tiny"


def make_engine(family: str = "llama", *, model: dict[str, Any] | None = None, **config: Any) -> Engine:
    """An engine on a tiny random fp32 base on the CPU."""
    torch_model = tiny_model(family, **(model or {})).requires_grad_(False)
    loaded = LoadedBase(
        model=torch_model,
        tokenizer=tiny_tokenizer(),
        name=BASE_NAME,
        source=Path("."),
        max_context=256,
        eos_token_ids=frozenset({EOS}),
        num_parameters=0,
        weight_bytes=0,
    )
    settings: dict[str, Any] = {"dtype": "float32", "device": "cpu", "kv_memory": MIB, "adapter_memory": 4 * MIB}
    return Engine(Base(loaded), EngineConfig(**(settings | config)))


def random_example(rng: random.Random, low: int, high: int) -> Example:
    """Random tokens; about a third of them (the last one always) are labels."""
    n = rng.randint(low, high)
    learn = [rng.random() < 0.35 for _ in range(n - 1)] + [True]
    return Example(tuple(rng.randrange(4, VOCAB) for _ in range(n)), tuple(learn))


def random_examples(count: int, low: int, high: int, seed: int) -> tuple[Example, ...]:
    """`count` examples of `low` to `high` tokens."""
    rng = random.Random(seed)
    return tuple(random_example(rng, low, high) for _ in range(count))


def random_factors(engine: Engine, spec: LoraSpec, seed: int, std: float = 0.05) -> Factors:
    """Random A and B for every module of `spec`."""
    generator = torch.Generator().manual_seed(seed)
    return {
        m.target.path: (
            std * torch.randn(m.rank, m.target.in_features, generator=generator),
            std * torch.randn(m.target.out_features, m.rank, generator=generator),
        )
        for m in resolve_modules(spec, engine.base.targets)
    }


def load_random_adapter(engine: Engine, name: str, spec: LoraSpec, seed: int) -> Factors:
    """Serve random weights as `name`."""
    factors = random_factors(engine, spec, seed)
    engine.adapters.load(name, spec, resolve_modules(spec, engine.base.targets), factors)
    return factors


def slot_factors(engine: Engine, slot: int, flat: Tensor | None = None) -> Factors:
    """A copy of a slot's weights, or of `flat` read in that slot's layout."""
    from loquetier.adapters.arena import factor_views

    modules = engine.arena.modules(slot)
    views = factor_views(engine.arena.flat(slot) if flat is None else flat, modules)
    return {m.target.path: (views[m.target.index].a_RK.clone(), views[m.target.index].b_RN.T.clone()) for m in modules}


def ignore(_job: FinetuneJob, _record: StepRecord | None) -> None:
    """A listener that does nothing."""


def start(
    engine: Engine, name: str, spec: LoraSpec, config: TrainingConfig, examples: Sequence[Example], **more: Any
) -> FinetuneJob:
    """`start_job` without evaluation data and listener."""
    return engine.jobs.start(name, spec, config, tuple(examples), more.pop("eval_examples", ()), ignore, **more)


@dataclass
class Watch:
    """What a job did, kept beyond its end: gradients of each step before clipping, and the weights after the last."""

    initial: Factors
    gradients: list[Tensor] = field(default_factory=list)
    weights: Tensor | None = None


def watch(engine: Engine, job: FinetuneJob) -> Watch:
    """Record a job's initial weights, the gradients that its optimizer sees, and its newest weights."""
    seen = Watch(slot_factors(engine, job.slot))
    step = job.optimizer.step

    def recorded(lr: float) -> float:
        seen.gradients.append(job.optimizer.grad.clone())
        norm = step(lr)
        seen.weights = job.optimizer.master.clone()
        return norm

    job.optimizer.step = recorded  # type: ignore[method-assign]
    return seen


def run(engine: Engine, before_step: Callable[[int], None] | None = None, limit: int = 5000) -> int:
    """Step until there is no work; returns the number of steps."""
    for count in range(limit):
        if before_step is not None:
            before_step(count)
        if not engine.has_work:
            return count
        engine.step()
    raise AssertionError(f"still working after {limit} steps")


@dataclass
class Answer:
    """What one request got."""

    model: str
    prompt: tuple[int, ...]
    events: list[TokenEvent] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return [e.token_id for e in self.events if e.token_id is not None]

    @property
    def is_finished(self) -> bool:
        return bool(self.events) and self.events[-1].finish_reason is not None


def ask(engine: Engine, model: str, prompt: Sequence[int], max_tokens: int, **params: Any) -> Answer:
    """A greedy request that runs to `max_tokens`."""
    answer = Answer(model, tuple(prompt))
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **params)
    engine.add_request(list(prompt), model, sampling, answer.events.append)
    return answer


class Traffic:
    """Requests on every name that answers, added now and then: seeded, so two runs see the same.

    Use as `before_step` of `run`.
    """

    def __init__(self, engine: Engine, seed: int, every: int = 3, until: Callable[[], bool] | None = None) -> None:
        self._engine, self._every = engine, every
        self._rng = random.Random(seed)
        self._until = until or (lambda: bool(engine.trainer.jobs))
        self.answers: list[Answer] = []

    def __call__(self, step: int) -> None:
        if step % self._every or not self._until():
            return
        names = [BASE_NAME, *self._engine.registry.names]
        prompt = [self._rng.randrange(4, VOCAB) for _ in range(self._rng.randint(1, 24))]
        model = names[self._rng.randrange(len(names))]
        self.answers.append(ask(self._engine, model, prompt, self._rng.randint(1, 12)))

    def check(self) -> None:
        """Every request was answered in full, and names of every kind were asked."""
        assert self.answers
        for answer in self.answers:
            assert answer.events[-1].finish_reason == "length", answer


# --- the oracle: PEFT and plain torch ---


def peft_model(family: str, spec: LoraSpec, factors: Factors, **model: Any) -> Any:
    """PEFT's model with our weights in it."""
    targets = spec.target_modules if isinstance(spec.target_modules, str) else list(spec.target_modules)
    config = LoraConfig(
        r=spec.r,
        lora_alpha=spec.alpha,
        target_modules=targets,
        use_rslora=spec.use_rslora,
        rank_pattern=dict(spec.rank_pattern),
        alpha_pattern=dict(spec.alpha_pattern),
        layers_to_transform=list(spec.layers_to_transform) if spec.layers_to_transform is not None else None,
        task_type="CAUSAL_LM",
    )
    twin = get_peft_model(tiny_model(family, **model), config)
    pairs = peft_parameters(twin)
    assert pairs.keys() == factors.keys()
    with torch.no_grad():
        for path, (a, b) in factors.items():
            pairs[path][0].copy_(a)
            pairs[path][1].copy_(b)
    return twin


def peft_parameters(twin: Any) -> Factors:
    """PEFT's own parameters by our paths."""
    return {
        name.removeprefix("base_model.model."): (module.lora_A.default.weight, module.lora_B.default.weight)
        for name, module in twin.named_modules()
        if hasattr(module, "lora_A")
    }


def peft_nll(twin: Any, example: Example) -> Tensor:
    """Sum of the labelled tokens' negative log-likelihoods, by Hugging Face's own forward."""
    logits = twin(input_ids=torch.tensor([example.tokens[:-1]])).logits[0]
    rows = torch.from_numpy(example.label_rows)
    return F.cross_entropy(logits[rows].float(), torch.from_numpy(example.label_targets), reduction="sum")


def peft_gradients(twin: Any, examples: Sequence[Example]) -> Factors:
    """Gradients of the mean loss over the labelled tokens of `examples`."""
    twin.zero_grad()
    labels = sum(e.num_labels for e in examples)
    for example in examples:
        (peft_nll(twin, example) / labels).backward()
    return {path: (a.grad.clone(), b.grad.clone()) for path, (a, b) in peft_parameters(twin).items()}


def peft_train(
    twin: Any,
    examples: Sequence[Example],
    config: TrainingConfig,
    total_steps: int,
    after_step: Callable[[int], None] = lambda step: None,
) -> list[float]:
    """The loop that everybody writes: one example at a time, torch's AdamW, transformers' schedule. Losses per step.

    `after_step` is called with the number of optimizer steps done.
    """
    parameters = [p for p in twin.parameters() if p.requires_grad]
    adam: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.weight_decay,
    }
    if config.loraplus_lr_ratio is None:
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(parameters, **adam)
    else:
        decay = {"loraplus_weight_decay": adam["weight_decay"]}
        ratio = config.loraplus_lr_ratio
        optimizer = create_loraplus_optimizer(twin, torch.optim.AdamW, loraplus_lr_ratio=ratio, **adam, **decay)
    kind = "constant_with_warmup" if config.lr_scheduler_type == "constant" else config.lr_scheduler_type
    warmup = math.ceil(config.warmup_ratio * total_steps)  # TrainingArguments.get_warmup_steps
    schedule = transformers.get_scheduler(kind, optimizer, warmup, total_steps)
    per_step = config.batch_size * config.gradient_accumulation_steps
    order = batches(len(examples), per_step, seed=config.seed, shuffle=config.shuffle, epochs=None)
    losses = []
    for _, numbers in zip(range(total_steps), order, strict=False):
        chosen = [examples[i] for i in numbers]
        labels = sum(e.num_labels for e in chosen)
        loss = 0.0
        for example in chosen:
            nll = peft_nll(twin, example)
            (nll / labels).backward()
            loss += float(nll.detach()) / labels
        if config.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss)
        after_step(len(losses))
    return losses


def relative_difference(ours: Factors, theirs: Factors) -> float:
    """Largest absolute difference over all factors, relative to the largest magnitude of each factor's tensor."""
    assert ours.keys() == theirs.keys()
    worst = 0.0
    for path, pair in ours.items():
        for mine, other in zip(pair, theirs[path], strict=True):
            scale = float(other.detach().abs().max()) or 1.0
            worst = max(worst, float((mine - other.detach()).abs().max()) / scale)
    return worst


def absolute_difference(ours: Factors, theirs: Factors) -> float:
    """Largest absolute difference over all factors."""
    return max(
        float((mine - other.detach()).abs().max())
        for path, pair in ours.items()
        for mine, other in zip(pair, theirs[path], strict=True)
    )


@contextmanager
def checked(engine: Engine) -> Iterator[Engine]:
    """The engine's books must add up at the end, and nothing may be left over."""
    yield engine
    engine.check_integrity()
    assert engine.trainer.tape is None
    assert not engine.trainer.jobs and not engine.serving.requests
