"""What halves memory: a base without its original weights (`serve_only`), adapters in bfloat16 (`adapter_dtype`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.parity.helpers import BASE_NAME, EngineFactory, ask, load_peft, new_engine, peft_model, prompt_of, run
from tests.tiny import tiny_model

from loquetier.adapters.methods.ia3 import IA3Spec
from loquetier.adapters.spec import LoraSpec
from loquetier.config import EngineConfig, Hardware, TrainingConfig, resolve
from loquetier.engine.engine import Engine
from loquetier.errors import ConfigError, ServeOnlyError
from loquetier.kernels.gemm import NO_KERNEL, GemmKernel
from loquetier.kernels.select import process_kernels
from loquetier.training.data import Example

__all__ = ["new_engine"]

_library = process_kernels("cpu").native("base_gemm")
needs_gemm = pytest.mark.skipif(
    _library is None or GemmKernel(_library).level == NO_KERNEL, reason="this machine has no AVX512_BF16"
)
EXAMPLES = tuple(Example(tuple(prompt_of(20, i)), (False,) * 5 + (True,) * 15) for i in range(4))


def bf16_llama(tie: bool = False) -> Any:
    return tiny_model("llama", layers=2, hidden=64, head_dim=16, tie=tie).bfloat16()


def tokens_of(engine: Engine, *models: str) -> list[list[int]]:
    """Prompts of more rows than a kernel for few rows takes, then single rows."""
    answers = [
        ask(engine, prompt_of(21 + i, i), model, max_tokens=9, ignore_eos=True) for i, model in enumerate(models)
    ]
    run(engine)
    return [answer.tokens() for answer in answers]


def start(engine: Engine, name: str = "job", spec: Any = None) -> Any:
    config = TrainingConfig(batch_size=2, num_epochs=2, learning_rate=1e-2, publish="every_step")
    return engine.jobs.start(name, spec or LoraSpec(r=4, alpha=8), config, EXAMPLES, (), lambda job, record: None)


@needs_gemm
@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_a_base_without_its_original_weights_answers_the_same(
    tie: bool, new_engine: EngineFactory, tmp_path: Path
) -> None:
    model = bf16_llama(tie)
    adapter = peft_model(model, 1, r=5, lora_alpha=10, target_modules="all-linear")
    whole, lean = new_engine(model), new_engine(model, serve_only=True)
    assert whole.base.fingerprint == lean.base.fingerprint
    layers = [t.index for t in lean.base.targets if t.layer is not None]
    assert all(lean.base.weight(i).is_meta and not whole.base.weight(i).is_meta for i in layers)
    for engine in (whole, lean):
        load_peft(engine, "a", adapter, tmp_path / "a")
    models = ("a", BASE_NAME, "a")
    assert tokens_of(lean, *models) == tokens_of(whole, *models)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_an_engine_that_only_serves_refuses_what_needs_the_weights(
    dtype: torch.dtype, new_engine: EngineFactory
) -> None:
    """In float32 nothing is dropped, and the answer is the same all the same: it must not hang on the machine."""
    engine = new_engine(bf16_llama().to(dtype), serve_only=True)
    with pytest.raises(ServeOnlyError, match="--serve-only"):
        start(engine)
    other = new_engine(bf16_llama().to(dtype))
    start(other, "ia3", IA3Spec())
    run(other)
    version, modules, factors = other.adapters.factors("ia3")
    with pytest.raises(ServeOnlyError, match=r"IA3|ia3"):
        engine.adapters.load("ia3", version.spec, modules, factors)
    assert not engine.arena.slots and not engine.registry.names


@needs_gemm
def test_bfloat16_adapters_compute_what_their_rounded_weights_say(new_engine: EngineFactory, tmp_path: Path) -> None:
    """To the bit: the C kernels sum in float32 either way, in the same order."""
    model = bf16_llama()
    adapter = peft_model(model, 1, r=5, lora_alpha=10, target_modules="all-linear")
    rounded = peft_model(model, 1, r=5, lora_alpha=10, target_modules="all-linear")
    for name, parameter in rounded.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16().to(parameter.dtype)
    small, exact = new_engine(model, adapter_dtype="bfloat16"), new_engine(model)
    load_peft(small, "a", adapter, tmp_path / "a")
    load_peft(exact, "a", rounded, tmp_path / "rounded")
    slots = [next(iter(engine.arena.slots)) for engine in (small, exact)]
    assert small.arena.dtype == torch.bfloat16 and exact.arena.dtype == torch.float32
    assert torch.equal(small.arena.flat(slots[0]).float(), exact.arena.flat(slots[1]))
    assert 2 * small.arena.slot_bytes(slots[0]) == exact.arena.slot_bytes(slots[1])
    assert tokens_of(small, "a", BASE_NAME, "a") == tokens_of(exact, "a", BASE_NAME, "a")


@needs_gemm
def test_what_a_job_publishes_in_bfloat16_is_what_its_forward_ran_on(new_engine: EngineFactory) -> None:
    engine = new_engine(bf16_llama(), adapter_dtype="bfloat16")
    job = start(engine)
    while engine.has_work:
        engine.step()
        if job.num_steps and not job.status.is_final:
            served = engine.registry.resolve("job")
            published, trained = engine.arena.flat(served.slot), engine.arena.flat(job.slot)
            assert published.dtype == torch.bfloat16 and torch.equal(published, trained)
    assert job.num_steps == 4 and engine.registry.resolve("job").number == 4


def test_bfloat16_adapters_need_a_bfloat16_base() -> None:
    cpu = Hardware(has_cuda=False, cpu_bf16_fast=True, free_memory=1 << 30)
    assert resolve(EngineConfig(), cpu).adapter_dtype == "float32"
    assert resolve(EngineConfig(adapter_dtype="bfloat16"), cpu).adapter_dtype == "bfloat16"
    with pytest.raises(ConfigError, match=r"adapter_dtype=.bfloat16.*float32"):
        resolve(EngineConfig(dtype="float32", adapter_dtype="bfloat16"), cpu)
    with pytest.raises(ConfigError, match="adapter_dtype"):
        EngineConfig(adapter_dtype="float16")  # type: ignore[arg-type]
