"""A method that the package does not have, in this file alone: it trains, serves, publishes, resumes and is exported.

Nothing else knows it: not the base, the scheduler, the engine, the checkpoints or the files. In the package it would
be one file beside `lora.py` and one name in the tuple that this test extends.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from tests.tiny import save_tiny
from torch import Tensor

from loquetier import EngineConfig, LoraSpec, Runtime, SamplingParams, TrainingConfig
from loquetier.adapters import methods
from loquetier.adapters.methods.method import ConfigRules, Part
from loquetier.adapters.spec import LinearTarget, ModulePlan
from loquetier.errors import UnsupportedAdapterError

DATA = [{"prompt": f"{a} then ", "completion": f"{b}!"} for a, b in zip("abcdefgh", "hgfedcba", strict=True)]
CONFIG = EngineConfig(dtype="float32", kv_memory=4 << 20, adapter_memory=4 << 20)
TRAINING = TrainingConfig(batch_size=2, max_steps=12, learning_rate=3e-1, publish="every_step")


# --- the method: y += gain * b, one trained bias per output ---


@dataclass(frozen=True, kw_only=True, slots=True)
class ShiftSpec:
    target_modules: str | tuple[str, ...] = ("o_proj", "down_proj")
    gain: float = 0.5
    exclude_modules: str | tuple[str, ...] = ()

    @property
    def method(self) -> str:
        return "shift"

    @property
    def layers_to_transform(self) -> None:
        return None

    @property
    def layers_pattern(self) -> tuple[str, ...]:
        return ()

    @property
    def dropout(self) -> float:
        return 0.0

    def plans(self, adapted: Sequence[LinearTarget]) -> tuple[ModulePlan, ...]:
        return tuple(ModulePlan(target, 1, self.gain, "shift") for target in adapted)

    def narrowed(self, target_modules: Any, layers: Any, targets: Sequence[LinearTarget]) -> ShiftSpec:
        return replace(self, target_modules=target_modules)


class Shift:
    name: Final = "shift"
    spec_type: Final = ShiftSpec
    changes_base_output: Final = False
    rules: Final = ConfigRules(
        peft_type="SHIFT",
        required=("peft_type", "target_modules", "gain"),
        honoured=frozenset({"base_model_name_or_path"}),
        inert=frozenset({"task_type"}),
    )

    def parts(self, plan: ModulePlan) -> tuple[Part, ...]:
        return (Part((1, plan.target.out_features), "shift", (plan.target.out_features,)),)

    def num_derived(self, plan: ModulePlan) -> int:
        return 0

    def kept_per_row(self, plan: ModulePlan) -> int:
        return 0

    def weights(self, plan: ModulePlan, parts: Sequence[Tensor], derived: Tensor | None) -> tuple[Tensor, float]:
        return parts[0][0], plan.scale

    def initialize(self, weights: Any, modules: Any, seed: int, base: Any) -> None:
        """Zero, as the slot is."""

    def derive(self, weights: Any, plan: ModulePlan, base: Any) -> None:
        raise AssertionError("nothing is derived")

    def forward(
        self, site: Any, x: Tensor, y: Tensor, segments: Any, table: Any, dropout: Any, num_kept: int, plan: Any
    ) -> None:
        for s in segments:
            if site.module in table[s.slot]:
                b_N, gain = table[s.slot][site.module]
                y[s.start : s.stop] += gain * b_N

    def base_gradient(self, site: Any, dy: Tensor, segments: Any, table: Any, dropout: Any) -> None:
        raise AssertionError("the base's output is not changed")

    def backward(
        self,
        site: Any,
        x: Tensor,
        dy: Tensor,
        dx: Tensor,
        segments: Any,
        table: Any,
        grads: Any,
        dropout: Any,
        kept: Any,
    ) -> None:
        for s in segments:
            if site.module in table[s.slot]:
                b_N, gain = grads[s.slot][site.module]
                b_N += gain * dy[s.start : s.stop].sum(0)

    def reads(self, fields: Mapping[str, Any]) -> bool:
        return fields.get("peft_type") == "SHIFT"

    def spec_of(self, fields: Mapping[str, Any]) -> ShiftSpec:
        return ShiftSpec(target_modules=tuple(fields["target_modules"]), gain=fields["gain"])

    def settings(self, spec: ShiftSpec, modules: Any = None) -> dict[str, Any]:
        return {"target_modules": list(spec.target_modules), "gain": spec.gain}


# --- what the house does with it ---


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny") / "base"
    save_tiny(directory, "llama")
    return directory


@pytest.fixture
def _with_shift(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "METHODS", (*methods.METHODS, Shift()))


@pytest.mark.usefixtures("_with_shift")
@pytest.mark.parametrize("tape", ["graph", "replay"])
def test_it_trains_among_others_serves_and_is_exported(base: Path, tape: Any, tmp_path: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    with Runtime(str(base), config=replace(CONFIG, tape=tape)) as runtime:
        lora = runtime.finetune("fox", DATA, lora=LoraSpec(r=4), training=TRAINING)
        shift = runtime.finetune("elk", DATA, spec=ShiftSpec(), training=TRAINING)
        while not shift.history:
            runtime.generate("warm", "fox" if lora.history else None, params)
        history = shift.wait(60)
        lora.wait(60)
        assert history[-1].loss < 0.8 * history[0].loss
        assert runtime.evaluate("elk", DATA).loss < 0.8 * runtime.evaluate(None, DATA).loss
        answers = runtime.generate("a then ", "elk", params), runtime.generate("a then ", None, params)
        assert answers[0].token_ids != answers[1].token_ids
        runtime.export_adapter("elk", tmp_path / "elk")
        assert json.loads((tmp_path / "elk" / "adapter_config.json").read_text())["peft_type"] == "SHIFT"
        info = runtime.load_adapter("copy", tmp_path / "elk")
        assert info.spec == ShiftSpec() and runtime.digest("copy") == runtime.digest("elk")
        runtime.check_integrity()


@pytest.mark.usefixtures("_with_shift")
def test_it_resumes_bit_for_bit(base: Path, tmp_path: Path) -> None:
    def exported(runtime: Runtime) -> bytes:
        runtime.export_adapter("elk", tmp_path / "out", overwrite=True)
        return (tmp_path / "out" / "adapter_model.safetensors").read_bytes()

    with Runtime(str(base), config=CONFIG) as runtime:
        runtime.finetune("elk", DATA, spec=ShiftSpec(), training=TRAINING).wait(60)
        expected = exported(runtime)
    reached = threading.Event()
    more: dict[str, Any] = {"checkpoint_dir": tmp_path / "c", "checkpoint_every": 2}
    with Runtime(str(base), config=CONFIG) as runtime:
        handle = runtime.finetune(
            "elk", DATA, spec=ShiftSpec(), training=TRAINING, callbacks=[lambda event: reached.set()], **more
        )
        assert reached.wait(60)
    assert len(handle.history) < 12, "closed too late for this test to test anything"
    with Runtime(str(base), config=CONFIG) as runtime:
        runtime.finetune("elk", DATA, spec=ShiftSpec(), training=TRAINING, resume=True, **more).wait(60)
        assert exported(runtime) == expected


def test_without_it_its_files_are_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "SHIFT", "target_modules": ["o_proj"], "gain": 1}')
    with Runtime(str(base), config=CONFIG) as runtime:
        with pytest.raises(UnsupportedAdapterError, match=r"'SHIFT'; only 'LORA', 'IA3' are supported"):
            runtime.load_adapter("elk", tmp_path)
        assert torch.is_grad_enabled()
