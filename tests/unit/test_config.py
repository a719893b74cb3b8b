"""Settings: defaults are valid, every range is held, messages name field, value and rule, and `resolve` is pure."""

from __future__ import annotations

import math
import pickle
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import loquetier
from loquetier import errors
from loquetier.config import MIB, EngineConfig, Hardware, SamplingParams, TrainingConfig, resolve
from loquetier.errors import ConfigError, LoquetierError

CPU = Hardware(has_cuda=False, cpu_bf16_fast=True, free_memory=8 << 30)
OLD_CPU = Hardware(has_cuda=False, cpu_bf16_fast=False, free_memory=8 << 30)
GPU = Hardware(has_cuda=True, cpu_bf16_fast=False, free_memory=80 << 30)


@pytest.mark.parametrize("cls", [SamplingParams, TrainingConfig, EngineConfig])
def test_defaults_are_valid_frozen_and_keyword_only(cls: type[Any]) -> None:
    value = cls()
    first = fields(cls)[0].name
    with pytest.raises(FrozenInstanceError):
        setattr(value, first, getattr(value, first))
    with pytest.raises(TypeError):
        cls(1)


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("max_tokens", [None, 1, 10**6], [0, -1, 1.5, True, "8"]),
        ("min_tokens", [0, 3], [-1, 0.5, None]),
        ("temperature", [0, 0.0, 1, 100], [-0.1, 101, math.nan, math.inf]),
        ("top_k", [-1, 0, 40], [-2, 1.0, True]),
        ("top_p", [1e-6, 1.0], [0, 1.01, -1, math.nan]),
        ("min_p", [0, 1], [-0.1, 1.1, math.nan]),
        ("repetition_penalty", [0.1, 2.0], [0, -1, math.inf, math.nan]),
        ("presence_penalty", [-2, 2], [-2.1, 2.1, math.nan]),
        ("frequency_penalty", [-2, 2], [-2.1, 2.1, math.nan]),
        ("logit_bias", [{}, {5: 100}, {5: -100.0}], [{5: 101}, {-1: 0}, {"5": 1}, {5: math.nan}]),
        ("stop", [(), ("a", "bc")], [("",), "a", (1,)]),
        ("stop_token_ids", [(), (0, 5)], [(-1,), (1.5,)]),
        ("n", [1, 128], [0, 129, 1.0]),
        ("seed", [None, 0, -5, 2**63 - 1], [2**63, 1.5]),
        ("logprobs", [None, 0, 20], [-1, 21, True]),
        ("prompt_logprobs", [None, 0, 20], [-1, 21]),
    ],
)
def test_sampling_ranges(field: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        SamplingParams(**{field: value})
    for value in bad:
        with pytest.raises(ConfigError, match=field):
            SamplingParams(**{field: value})


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("learning_rate", [1e-6, 1], [0, -1e-4, 1.1, math.nan]),
        ("lr_scheduler_type", ["constant", "linear", "cosine"], ["polynomial", ""]),
        ("warmup_ratio", [0, 1], [-0.1, 1.1, math.nan]),
        ("weight_decay", [0, 1], [-0.1, 1.1]),
        ("adam_beta1", [0, 0.99], [1, -0.1]),
        ("adam_beta2", [0, 0.999], [1, -0.1]),
        ("adam_epsilon", [1e-8], [0, -1]),
        ("max_grad_norm", [0, 1.0], [-1, math.inf, math.nan]),
        ("batch_size", [1, 64], [0, 1.5, True]),
        ("gradient_accumulation_steps", [1], [0]),
        ("max_seq_len", [2, 4096], [1, 0]),
        ("num_epochs", [1, 3], [0]),
        ("max_steps", [None, 1], [0, -1, 2.5]),
        ("publish", ["every_step", "every_n_steps", "end"], ["never", "checkpoints"]),
        ("publish_every", [1], [0, 10]),
        ("eval_every", [0, 5], [-1, 0.5]),
        ("seed", [0, 2**63 - 1], [-1, 2**63, 0.5]),
    ],
)
def test_training_ranges(field: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        TrainingConfig(**{field: value})
    for value in bad:
        with pytest.raises(ConfigError, match=field):
            TrainingConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("dtype", ["float16", "fp32"]),
        ("page_size", [0, -1, 1.5]),
        ("max_rows", [0]),
        ("max_prefill_rows", [0]),
        ("max_train_rows", [0]),
        ("max_sequences", [0]),
        ("backward_units_while_serving", [0]),
        ("tape", ["none", None]),
        ("train_window", [0, 1.5]),
        ("train_memory", [0, MIB - 1]),
        ("kv_memory", [0, MIB - 1, 1.5 * MIB]),
        ("adapter_memory", [0, MIB - 1]),
        ("max_context", [0, 1]),
    ],
)
def test_engine_ranges(field: str, bad: list[Any]) -> None:
    for value in bad:
        with pytest.raises(ConfigError, match=field):
            EngineConfig(**{field: value})


def test_message_names_field_value_and_rule() -> None:
    with pytest.raises(ConfigError, match=r"^top_p=1\.5: must be in \(0, 1\]$"):
        SamplingParams(top_p=1.5)
    with pytest.raises(ConfigError, match=r"min_tokens=9: must be <= max_tokens \(8\)"):
        SamplingParams(max_tokens=8, min_tokens=9)


def test_resolve_fills_every_auto() -> None:
    on_cpu = resolve(EngineConfig(), CPU)
    assert (on_cpu.device, on_cpu.dtype) == ("cpu", "bfloat16")
    assert (on_cpu.kv_memory, on_cpu.adapter_memory) == (2 << 30, 1 << 30)
    assert resolve(EngineConfig(), OLD_CPU).dtype == "float32"
    on_gpu = resolve(EngineConfig(), GPU)
    assert (on_gpu.device, on_gpu.dtype) == ("cuda", "bfloat16")
    assert (on_gpu.kv_memory, on_gpu.adapter_memory) == (20 << 30, 10 << 30)


def test_resolve_caps_the_cpu_and_keeps_what_was_asked_for() -> None:
    big = Hardware(has_cuda=False, cpu_bf16_fast=True, free_memory=1 << 40)
    assert (resolve(EngineConfig(), big).kv_memory, resolve(EngineConfig(), big).adapter_memory) == (4 << 30, 2 << 30)
    asked = EngineConfig(
        device="cpu", dtype="float32", adapter_dtype="float32", kv_memory=5 * MIB, adapter_memory=6 * MIB,
        train_memory=7 * MIB, host_adapter_memory=0, async_scheduling=False, cuda_graphs=False,
    )  # fmt: skip
    assert resolve(EngineConfig(), big).train_memory == 1 << 38
    assert resolve(asked, GPU) == asked


def test_resolve_refuses_a_gpu_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="cuda:1"):
        resolve(EngineConfig(device="cuda:1"), CPU)


@given(free=st.integers(0, 1 << 42), cuda=st.booleans(), fast=st.booleans())
def test_resolve_is_idempotent_and_valid(free: int, cuda: bool, fast: bool) -> None:
    hardware = Hardware(has_cuda=cuda, cpu_bf16_fast=fast, free_memory=free)
    once = resolve(EngineConfig(), hardware)
    assert resolve(once, hardware) == once
    assert once.kv_memory is not None and once.kv_memory >= MIB
    assert once.train_memory is not None and once.train_memory >= MIB
    assert "auto" not in (once.device, once.dtype)


ERRORS = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, LoquetierError)]


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: e.__name__)
def test_errors_are_stdlib_errors_and_pickle(error: type[LoquetierError]) -> None:
    stdlib = [base for base in error.__mro__ if base.__module__ == "builtins"]
    assert error is LoquetierError or stdlib[0] is not Exception
    assert 400 <= error.status < 600 and error.code
    copy = pickle.loads(pickle.dumps(error("what and why")))
    assert type(copy) is error and str(copy) == "what and why"


def test_public_names_are_lazy_and_complete() -> None:
    assert loquetier.SamplingParams is SamplingParams
    assert loquetier.EngineConfig is EngineConfig
    assert loquetier.TrainingConfig is TrainingConfig
    assert loquetier.errors is errors
    assert loquetier.LoraSpec.__name__ == "LoraSpec"
    assert set(loquetier.__all__) <= set(dir(loquetier))
    with pytest.raises(AttributeError, match=r"SampleParams.*SamplingParams"):
        _ = loquetier.SampleParams  # type: ignore[attr-defined]
