"""DoRA and IA3 through a job's whole life: publish, evaluate, export, continue, resume, move, and what is refused."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tests.tiny import save_tiny

from loquetier import EngineConfig, IA3Spec, LoraSpec, Runtime, SamplingParams, TrainingConfig
from loquetier.adapters.spec import AdapterSpec
from loquetier.errors import ConfigError
from loquetier.finetuning import JobEvent
from loquetier.virtual import VirtualModel

DATA = [{"prompt": f"{a} then ", "completion": f"{b}!"} for a, b in zip("abcdefgh", "hgfedcba", strict=True)]
CONFIG = EngineConfig(dtype="float32", kv_memory=4 << 20, adapter_memory=4 << 20)
TRAINING = TrainingConfig(batch_size=2, max_steps=10, learning_rate=3e-2, seed=3, lr_scheduler_type="cosine")
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
SPECS = {
    "dora": LoraSpec(r=4, alpha=8, use_dora=True),
    "dora-dropout": LoraSpec(r=4, alpha=8, use_dora=True, dropout=0.2),
    "ia3": IA3Spec(),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny") / "base"
    save_tiny(directory, "llama")
    return directory


@pytest.fixture(params=list(SPECS))
def spec(request: pytest.FixtureRequest) -> AdapterSpec:
    found: AdapterSpec = SPECS[request.param]
    return found


def exported(runtime: Runtime, directory: Path) -> bytes:
    runtime.export_adapter("fox", directory, overwrite=True)
    return (directory / "adapter_model.safetensors").read_bytes()


def train(runtime: Runtime, spec: AdapterSpec, name: str = "fox", **more: Any) -> Any:
    return runtime.finetune(name, DATA, spec=spec, **({"training": TRAINING} | more))


def break_off(base: Path, spec: AdapterSpec, directory: Path, config: EngineConfig) -> None:
    """Start the job in a runtime of its own and close that as soon as three steps are done."""
    reached = threading.Event()

    def watch(event: JobEvent) -> None:
        if event.record is not None and event.record.step >= 3:
            reached.set()

    with Runtime(str(base), config=config) as runtime:
        handle = train(runtime, spec, callbacks=[watch], checkpoint_dir=directory, checkpoint_every=2)
        assert reached.wait(60)
    assert len(handle.history) < 10, "the runtime was closed too late for this test to test anything"


def test_closed_midway_and_resumed_ends_where_the_unbroken_run_does(
    base: Path, spec: AdapterSpec, tmp_path: Path
) -> None:
    with Runtime(str(base), config=CONFIG) as runtime:
        expected = [record.loss for record in train(runtime, spec).wait(60)]
        weights = exported(runtime, tmp_path / "unbroken")
    break_off(base, spec, tmp_path / "c", CONFIG)
    with Runtime(str(base), config=CONFIG) as runtime:
        handle = train(runtime, spec, checkpoint_dir=tmp_path / "c", checkpoint_every=2, resume=True)
        # No tolerance: the same numbers through the same kernels in the same order.
        assert [record.loss for record in handle.wait(60)] == expected
        assert handle.resumed is not None and handle.resumed.differences == ()
        assert exported(runtime, tmp_path / "out") == weights
        runtime.check_integrity()


def test_a_checkpoint_that_is_served_answers_with_the_norms_of_its_weights(base: Path, tmp_path: Path) -> None:
    """publish="checkpoint" copies weights from the disk's image: what DoRA derives from them is computed anew."""
    training = replace(TRAINING, max_steps=5000, publish="checkpoint")  # so many that the pause comes before the end
    ready, paused = threading.Event(), threading.Event()

    def pause(event: JobEvent) -> None:
        if event.kind == "checkpoint" and not paused.is_set() and ready.wait(60):
            handle.pause()
            paused.set()

    with Runtime(str(base), config=CONFIG) as runtime:
        place = {"checkpoint_dir": tmp_path / "c", "checkpoint_every": 2, "checkpoints_to_keep": 9999}
        handle = train(runtime, SPECS["dora"], training=training, callbacks=[pause], **place)
        ready.set()
        assert paused.wait(60)

        def served() -> tuple[int, int] | None:
            """Step and version of the last checkpoint; None while steps, or images on their way to disk, may come."""
            job = handle.job
            last = job.num_steps - job.num_steps % place["checkpoint_every"]
            return None if runtime._engine.has_work or last not in job.versions else (last, job.versions[last])

        while (found := runtime._loop.call(served)) is None:
            assert not handle.status.is_final
        step, number = found
        path = handle.checkpoint_at(step)
        assert path is not None
        runtime.load_adapter("again", path)
        assert runtime.adapter("fox").version == number
        assert runtime.evaluate("fox", DATA).loss == pytest.approx(runtime.evaluate("again", DATA).loss, rel=1e-6)
        handle.cancel()


def test_what_is_exported_is_what_answers_and_stock_peft_loads_it(
    base: Path, spec: AdapterSpec, tmp_path: Path
) -> None:
    with Runtime(str(base), config=CONFIG) as runtime:
        history = train(runtime, spec).wait(60)
        assert history[-1].loss < history[0].loss
        measured = runtime.evaluate("fox", DATA)
        assert measured.loss < runtime.evaluate(None, DATA).loss
        exported(runtime, tmp_path / "out")
        info = runtime.load_adapter("again", tmp_path / "out")
        assert info.spec.method == spec.method and runtime.digest("again") == runtime.digest("fox")
        assert runtime.evaluate("again", DATA) == measured
        answer = runtime.generate("a then ", "fox", GREEDY)
        assert runtime.generate("a then ", "again", GREEDY).token_ids == answer.token_ids
        prompt, tokens = list(answer.prompt_token_ids), answer.token_ids
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    twin = peft.PeftModel.from_pretrained(model, str(tmp_path / "out")).eval()
    with torch.no_grad():
        theirs = twin(input_ids=torch.tensor([prompt + tokens])).logits[0].argmax(-1)
    assert theirs[len(prompt) - 1 : -1].tolist() == tokens  # greedy, end tokens included


def test_a_job_that_moves_to_another_runtime_goes_on_bit_for_bit(base: Path, spec: AdapterSpec) -> None:
    with Runtime(str(base), config=CONFIG) as runtime:
        train(runtime, spec).wait(60)
        expected = runtime.digest("fox")
    with Runtime(str(base), config=CONFIG) as one, Runtime(str(base), config=CONFIG) as two:
        job = train(one, spec)
        while len(job.history) < 2:
            one.generate("wait", None, GREEDY)
        moved = VirtualModel(one, "fox", job).migrate(two)
        assert moved.job is not None
        moved.job.wait(60)
        assert two.digest("fox") == expected
        one.check_integrity()
        two.check_integrity()


def test_continuing_a_served_adapter_takes_its_method(base: Path, spec: AdapterSpec) -> None:
    training = TrainingConfig(batch_size=2, max_steps=1, learning_rate=1e-30)
    with Runtime(str(base), config=CONFIG) as runtime:
        train(runtime, spec).wait(60)
        runtime.finetune("second", DATA, start_from="fox", training=training).wait(60)
        assert runtime.adapter("second").spec == spec
        assert runtime.digest("second") == runtime.digest("fox")  # at a rate of (nearly) zero nothing moved
        with pytest.raises(ConfigError, match="its method, modules, ranks or scales"):
            runtime.finetune("third", DATA, lora=LoraSpec(r=4, alpha=8), start_from="fox", training=training)


def test_lora_plus_speeds_b_and_the_magnitude_up(base: Path, tmp_path: Path) -> None:
    """As PEFT groups them: one Adam step from fresh weights moves a weight by its rate, whatever the gradient."""
    training = TrainingConfig(batch_size=2, max_steps=1, learning_rate=1e-4, loraplus_lr_ratio=8.0, max_grad_norm=0.0)
    with Runtime(str(base), config=CONFIG) as runtime:
        frozen = TrainingConfig(batch_size=2, max_steps=1, learning_rate=1e-30)
        train(runtime, SPECS["dora"], training=frozen).wait(60)
        exported(runtime, tmp_path / "fresh")
        train(runtime, SPECS["dora"], training=training).wait(60)
        exported(runtime, tmp_path / "stepped")
    fresh, stepped = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("fresh", "stepped"))
    for name, tensor in stepped.items():
        moved = float((tensor - fresh[name]).abs().max())
        rate = 0.0 if "lora_A" in name else 8e-4  # B is zero at first, so A has no gradient yet
        # Adam's epsilon takes a little where the gradient is small; float32 rounds magnitudes of about 2 at 1e-7.
        assert moved == pytest.approx(rate, rel=0.02, abs=1e-9), name


def test_what_does_not_fit_is_refused_before_anything_starts(base: Path) -> None:
    with Runtime(str(base), config=CONFIG) as runtime:
        for later in (False, True):  # nothing of it waits for data or memory
            with pytest.raises(ConfigError, match=r"loraplus_lr_ratio=4\.0: ia3 has no B"):
                training = TrainingConfig(loraplus_lr_ratio=4.0)
                train(runtime, IA3Spec(), training=training, validate_in_background=later)
        with pytest.raises(ConfigError, match="lora and spec are both given"):
            runtime.finetune("fox", DATA, lora=LoraSpec(), spec=IA3Spec())
        for wrong in ({"r": 4}, IA3Spec, "ia3"):
            with pytest.raises(ConfigError, match=r"spec is .*must be a LoraSpec, an IA3Spec"):
                runtime.finetune("fox", DATA, spec=wrong)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="lora is IA3Spec"):
            runtime.finetune("fox", DATA, lora=IA3Spec())  # type: ignore[arg-type]
        assert runtime.adapters() == []
        runtime.check_integrity()


def test_the_tape_policy_counts_what_dora_keeps(base: Path) -> None:
    """Every adapted linear's output, per train row, in the base's dtype."""
    with Runtime(str(base), config=CONFIG) as runtime:
        engine = runtime._engine
        outputs = sum(t.out_features for t in engine.base.targets if t.layer is not None)
        kept = []
        for name, own in (("a", LoraSpec(r=4)), ("b", IA3Spec()), ("c", SPECS["dora"])):
            runtime._loop.call(lambda name=name, own=own: kept.append(kept_after_start(engine, name, own)))
        widths = {t.path.rpartition(".")[2]: t.out_features for t in engine.base.targets}
        assert kept == [0, 2 * (widths["k_proj"] + widths["v_proj"]), outputs]


def kept_after_start(engine: Any, name: str, spec: AdapterSpec) -> int:
    from tests.parity.training_helpers import random_examples, start

    job = start(engine, name, spec, TRAINING, random_examples(2, 5, 9, 1))
    kept: int = engine.admission._admitted[job.job_id].kept
    return kept


def test_a_checkpoint_from_before_use_dora_existed_is_read(base: Path, tmp_path: Path) -> None:
    """Its spec lacks the field; the job is one without."""
    from loquetier.training.checkpoint import _state_digest

    spec = LoraSpec(r=4)
    break_off(base, spec, tmp_path / "c", CONFIG)
    for path in tmp_path.glob("c/step-*/trainer_state.json"):
        outer = json.loads(path.read_text())
        del outer["state"]["job"]["spec"]["use_dora"]
        path.write_text(json.dumps({"sha256": _state_digest(outer["state"]), "state": outer["state"]}))
    with Runtime(str(base), config=CONFIG) as runtime:
        handle = train(runtime, spec, checkpoint_dir=tmp_path / "c", checkpoint_every=2, resume=True)
        assert handle.resumed is not None and len(handle.wait(60)) == 10
