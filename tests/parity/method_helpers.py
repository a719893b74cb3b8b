"""Adapters of every method as stock PEFT makes them, and what it computes with them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tests.parity.training_helpers import Engine, peft_nll, start
from torch import Tensor

from loquetier.adapters.orientation import to_peft
from loquetier.adapters.peft_io import read_adapter, write_adapter
from loquetier.adapters.peft_keys import expected_factors
from loquetier.adapters.spec import AdapterSpec
from loquetier.config import TrainingConfig
from loquetier.training.data import Example
from loquetier.training.job import FinetuneJob

Tensors = dict[str, Tensor]
"""By the names that PEFT gives them in a file."""

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIGS: dict[str, PeftConfig] = {
    "lora": LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=ALL),
    "dora": LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=ALL, use_dora=True),
    "dora-rs": LoraConfig(
        task_type="CAUSAL_LM",
        r=6,
        lora_alpha=3,
        use_rslora=True,
        target_modules=["k_proj", "down_proj", "up_proj", "lm_head"],
        rank_pattern={"k_proj": 2},
        use_dora=True,
    ),
    "ia3": IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    # Inputs that siblings share: k_proj's with q and v, up_proj's with gate.
    "ia3-siblings": IA3Config(
        task_type="CAUSAL_LM",
        target_modules=["k_proj", "v_proj", "up_proj", "gate_proj", "o_proj", "lm_head"],
        feedforward_modules=["k_proj", "up_proj"],
    ),
}


def peft_adapter(base: Any, config: PeftConfig, seed: int) -> Any:
    """PEFT's model on a copy of `base`, every trained tensor moved at random from where PEFT begins."""
    twin = get_peft_model(copy.deepcopy(base), copy.deepcopy(config)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                # Factors are drawn, magnitudes and IA3's vectors scaled: they begin at the norms, and at ones.
                parameter.copy_(0.1 * noise if "lora_A" in name or "lora_B" in name else parameter * (1 + 0.3 * noise))
    return twin


def file_name(parameter: str) -> str:
    """The name in a file of one of PEFT's parameters."""
    return parameter.replace(".default", "").replace("lora_magnitude_vector.weight", "lora_magnitude_vector")


def trained(twin: Any) -> Tensors:
    """PEFT's own parameters."""
    return {file_name(name): p for name, p in twin.named_parameters() if p.requires_grad}


def gradients(twin: Any, examples: Sequence[Example]) -> Tensors:
    """Of the mean loss over the labelled tokens of `examples`."""
    twin.zero_grad()
    labels = sum(e.num_labels for e in examples)
    for example in examples:
        (peft_nll(twin, example) / labels).backward()
    return {name: p.grad.clone() for name, p in trained(twin).items()}


def slot_tensors(engine: Engine, slot: int, flat: Tensor | None = None) -> Tensors:
    """A slot's weights, or `flat` read in its layout."""
    modules = engine.arena.modules(slot)
    by_path = to_peft(engine.arena.flat(slot) if flat is None else flat, modules)
    return {name: by_path[key.path][key.number] for name, key in expected_factors(modules).items()}


def load(engine: Engine, name: str, twin: Any, directory: Path) -> AdapterSpec:
    """Saved by PEFT, read and served by us."""
    twin.save_pretrained(directory, save_embedding_layers=False)
    found = read_adapter(directory, engine.base.targets)
    engine.adapters.load(name, found.spec, found.modules, found.factors)
    return found.spec


def export(engine: Engine, name: str, directory: Path) -> None:
    """Written by us."""
    version, modules, factors = engine.adapters.factors(name)
    write_adapter(directory, spec=version.spec, modules=modules, factors=factors, base_name=None)


def stock_peft(base: Any, directory: Path) -> Any:
    """Read by PEFT, on a copy of `base`; every tensor of the file must have been taken."""
    twin = PeftModel.from_pretrained(copy.deepcopy(base), str(directory), is_trainable=True).eval()
    found, taken = load_file(directory / "adapter_model.safetensors"), trained(twin)
    assert found.keys() == taken.keys()
    assert all(torch.equal(found[name], taken[name]) for name in found)
    return twin


def first_gradients(engine: Engine, jobs: Sequence[FinetuneJob]) -> list[Tensor]:
    """The flat gradient that each job's first optimizer step sees; runs the engine until all have had it."""
    seen: dict[int, Tensor] = {}
    for job in jobs:
        _record(job, seen)
    while len(seen) < len(jobs):
        assert engine.has_work
        engine.step()
    return [seen[job.job_id] for job in jobs]


def _record(job: FinetuneJob, seen: dict[int, Tensor]) -> None:
    step = job.optimizer.step

    def recorded(lr: float) -> float:
        seen.setdefault(job.job_id, job.optimizer.grad.clone())
        return step(lr)

    job.optimizer.step = recorded  # type: ignore[method-assign]


def continue_from(
    engine: Engine, name: str, spec: AdapterSpec, config: TrainingConfig, data: Sequence[Example], source: str
) -> FinetuneJob:
    """A job that begins with a served adapter's weights."""
    return start(engine, name, spec, config, data, start_from=source)


def relative_norm(ours: Tensors, theirs: Tensors) -> float:
    """Worst ``|ours - theirs| / |theirs|`` of any tensor."""
    assert ours.keys() == theirs.keys()
    return max(
        float(torch.linalg.vector_norm(ours[name] - theirs[name]) / torch.linalg.vector_norm(theirs[name]))
        for name in ours
    )
