"""LoRA, DoRA, IA3 and the base share steps, and each equals stock PEFT alone: logits, gradients, training, files.

The base has biases on q, k and v (Qwen2), which DoRA must leave out of its scale and IA3 must scale.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig
from safetensors.torch import load_file
from tests.parity import helpers
from tests.parity.helpers import FP32_TOLERANCE, LogitRecorder, max_error, prompt_of, reference_logits
from tests.parity.method_helpers import (
    CONFIGS,
    continue_from,
    export,
    first_gradients,
    gradients,
    load,
    peft_adapter,
    relative_norm,
    slot_tensors,
    stock_peft,
    trained,
)
from tests.parity.test_dropout_parity import OurMask
from tests.parity.training_helpers import (
    MIB,
    Engine,
    Traffic,
    ask,
    checked,
    make_engine,
    peft_nll,
    peft_train,
    random_examples,
    run,
    start,
)
from tests.tiny import tiny_model

from loquetier.adapters.spec import LoraSpec
from loquetier.config import TrainingConfig
from loquetier.kernels.dropout import row_keys

GRADIENT_RTOL = 1e-5
"""Of each tensor's norm. Measured 2e-6; float32 rounds at 6e-8 and the order of sums differs.
A wrong factor gives 1e-1."""
LOSS_RTOL = 1e-4
ONE_STEP = TrainingConfig(batch_size=3, max_steps=1, shuffle=False)
DATA = random_examples(3, 9, 33, 5)


@pytest.fixture(scope="module")
def base() -> Any:
    return tiny_model("qwen2")


@pytest.fixture(scope="module")
def twins(base: Any) -> dict[str, Any]:
    return {name: peft_adapter(base, config, seed) for seed, (name, config) in enumerate(CONFIGS.items())}


def engine_with(twins: dict[str, Any], directory: Path, **config: Any) -> tuple[Engine, dict[str, Any]]:
    engine = make_engine("qwen2", adapter_memory=16 * MIB, **config)
    return engine, {name: load(engine, name, twin, directory / name) for name, twin in twins.items()}


def test_logits_of_mixed_steps_equal_peft(base: Any, twins: dict[str, Any], tmp_path: Path) -> None:
    engine, _ = engine_with(twins, tmp_path, page_size=4, max_prefill_rows=29)
    recorder = LogitRecorder(engine)
    for seed, name in enumerate([*CONFIGS, helpers.BASE_NAME, *CONFIGS]):
        helpers.ask(engine, prompt_of(3 + 5 * seed, seed), name, max_tokens=9)
    helpers.run(engine)
    assert any(len({s.slot for s in p.decode}) == len(CONFIGS) + 1 for p in recorder.plans), "never all in one step"
    names = {v.slot: v.name for v in engine.registry.versions}
    for seq, ours in recorder.results():
        oracle = twins[names[seq.slot]] if seq.slot in names else base
        assert max_error(ours, reference_logits(oracle, seq.tokens[:-1])) <= FP32_TOLERANCE, names.get(seq.slot)


def test_the_adapters_matter(base: Any, twins: dict[str, Any]) -> None:
    plain = reference_logits(base, prompt_of(20, 1))
    for name, twin in twins.items():
        assert max_error(reference_logits(twin, prompt_of(20, 1)), plain) > 1000 * FP32_TOLERANCE, name


@pytest.mark.parametrize("tape", ["graph", "replay"])
def test_gradients_of_mixed_steps_equal_peft(tape: str, twins: dict[str, Any], tmp_path: Path) -> None:
    """One tape holds rows of every method in training, beside rows of every method that is served."""
    engine, specs = engine_with(twins, tmp_path, tape=tape, train_window=17, backward_units_while_serving=1)
    with checked(engine):
        jobs = [continue_from(engine, f"job-{name}", specs[name], ONE_STEP, DATA, name) for name in CONFIGS]
        slots = [engine.registry.resolve(name).slot for name in CONFIGS]
        for name in CONFIGS:
            ask(engine, name, range(10, 22), 6)
        for name, slot, flat in zip(CONFIGS, slots, first_gradients(engine, jobs), strict=True):
            ours, theirs = slot_tensors(engine, slot, flat), gradients(twins[name], DATA)
            assert relative_norm(ours, theirs) < GRADIENT_RTOL, name
        run(engine)


@pytest.mark.parametrize("name", ["dora", "dora-rs", "ia3", "ia3-siblings"])
def test_twenty_steps_equal_a_peft_loop(name: str, base: Any, twins: dict[str, Any], tmp_path: Path) -> None:
    """From fresh weights, which are PEFT's but for A; with decay, clipping, accumulation and traffic."""
    config = TrainingConfig(
        learning_rate=1e-2, batch_size=2, gradient_accumulation_steps=2, max_steps=20, weight_decay=0.05, seed=7
    )
    examples = random_examples(11, 8, 30, 6)
    engine, specs = engine_with({name: twins[name]}, tmp_path, backward_units_while_serving=1)
    with checked(engine):
        job = start(engine, "job", specs[name], config, examples)
        twin = peft_adapter(base, CONFIGS[name], 0)
        fresh = peft_fresh(base, name)
        for key, tensor in slot_tensors(engine, job.slot).items():
            if "lora_A" not in key:
                # |W| is a sum in another order; ones and zeros are exact.
                torch.testing.assert_close(tensor, fresh[key], rtol=1e-6, atol=0.0)
            trained(twin)[key].data.copy_(tensor)
        expected = peft_train(twin, examples, config, 20)
        traffic = Traffic(engine, seed=3)
        run(engine, traffic)
        traffic.check()
        torch.testing.assert_close([r.loss for r in job.history], expected, rtol=LOSS_RTOL, atol=0.0)
        assert abs(expected[-1] - expected[0]) > 0.05 * expected[0], "nothing was learned: the comparison is empty"
        ours = slot_tensors(engine, engine.registry.resolve("job").slot)
        assert relative_norm(ours, {k: p.detach() for k, p in trained(twin).items()}) < 1e-3


def peft_fresh(base: Any, name: str) -> dict[str, torch.Tensor]:
    import copy

    from peft import get_peft_model

    fresh = trained(get_peft_model(copy.deepcopy(base), copy.deepcopy(CONFIGS[name])))
    return {key: parameter.detach() for key, parameter in fresh.items()}


@pytest.mark.parametrize("tape", ["graph", "replay"])
def test_dora_with_dropout_equals_peft_with_the_same_masks(
    tape: str, twins: dict[str, Any], base: Any, tmp_path: Path
) -> None:
    """PEFT's DoRA drops the input of the base's part of the correction too."""
    twin = peft_adapter(base, CONFIGS["dora"], 1)
    engine, specs = engine_with({"dora": twin}, tmp_path, tape=tape, train_window=13)
    spec = replace(specs["dora"], dropout=0.25)
    current: dict[str, torch.Tensor] = {}
    index = {t.path: t.index for t in engine.base.targets}
    for path, module in twin.named_modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = OurMask(index[path.removeprefix("base_model.model.")], 0.25, current)
    twin.train()
    with checked(engine):
        job = continue_from(engine, "job", spec, ONE_STEP, DATA, "dora")
        items = [(item.item_id, job.example(item.item_id)) for item in job.ready_items()]
        slot = engine.registry.resolve("dora").slot
        (flat,) = first_gradients(engine, [job])
        plain = gradients(twins["dora"], DATA)
        twin.zero_grad()
        labels = sum(example.num_labels for _, example in items)
        for item_id, example in items:
            current["keys"] = torch.from_numpy(row_keys(ONE_STEP.seed, 1, item_id, example.num_rows))
            (peft_nll(twin, example) / labels).backward()
        theirs = {key: p.grad for key, p in trained(twin).items()}
        ours = slot_tensors(engine, slot, flat)
        assert relative_norm(ours, theirs) < GRADIENT_RTOL
        assert relative_norm(ours, plain) > 0.1
        run(engine)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_files_go_round_through_stock_peft(name: str, base: Any, twins: dict[str, Any], tmp_path: Path) -> None:
    """Saved by PEFT, read and written by us, read by PEFT: the same bytes of every tensor, the same logits."""
    engine, specs = engine_with({name: twins[name]}, tmp_path)
    export(engine, name, tmp_path / "ours")
    before = load_file(tmp_path / name / "adapter_model.safetensors")
    after = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    again = stock_peft(base, tmp_path / "ours")
    tokens = prompt_of(20, 3)
    assert torch.equal(reference_logits(again, tokens), reference_logits(twins[name], tokens))
    digest = engine.adapters.digest(name)
    second, found = engine_with({"again": again}, tmp_path / "second")
    assert second.adapters.digest("again") == digest
    assert found["again"].method == specs[name].method


def test_digests_tell_methods_apart(twins: dict[str, Any], tmp_path: Path) -> None:
    engine, _ = engine_with(twins, tmp_path)
    assert len({engine.adapters.digest(name) for name in CONFIGS}) == len(CONFIGS)


def test_norms_follow_every_change_of_the_weights(twins: dict[str, Any], tmp_path: Path) -> None:
    """Loaded, copied for a job, stepped, published: the norms beside a DoRA slot are those of its weights."""
    engine, specs = engine_with({"dora": twins["dora"]}, tmp_path)
    config = TrainingConfig(batch_size=1, max_steps=3, learning_rate=1e-2, publish="every_step")
    slots: list[int] = [engine.registry.resolve("dora").slot]
    job = continue_from(engine, "job", specs["dora"], config, DATA, "dora")
    slots.append(job.slot)
    while engine.has_work:
        for slot in slots:
            expect_fresh_norms(engine, slot)
        engine.step()
        slots = sorted(engine.arena.slots)
    assert job.num_steps == 3 and engine.registry.resolve("job").number == 3


def expect_fresh_norms(engine: Engine, slot: int) -> None:
    for plan in engine.arena.modules(slot):
        own = engine.arena.factors[slot][plan.target.index]
        weight_NK = engine.base.weight(plan.target.index) + plan.scale * own.lora.b_RN.T @ own.lora.a_RK
        # The same sum in another order: float32 rounding.
        torch.testing.assert_close(own.norm_N, torch.linalg.vector_norm(weight_NK, dim=1), rtol=1e-6, atol=0.0)


def test_lora_steps_call_smlm_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call per member over all segments: what a compiled backend replaces."""
    from loquetier.adapters.methods import lora

    calls: list[int] = []
    forward = lora.smlm_forward

    def counted(x: Any, y: Any, module: int, segments: Any, table: Any, plan: Any) -> None:
        assert plan is not None, "its pointers would be looked up at every call"
        calls.append(len(segments))
        forward(x, y, module, segments, table, plan)

    monkeypatch.setattr(lora, "smlm_forward", counted)
    engine = make_engine()
    from tests.parity.training_helpers import load_random_adapter

    for seed, name in enumerate("ab"):
        load_random_adapter(engine, name, LoraSpec(r=2 + seed, target_modules=("q_proj", "k_proj")), seed)
        ask(engine, name, range(10, 20), 1)
    engine.step()
    # The step's linears with an adapter on some member: q|k|v in each of two layers, three members each.
    assert calls == [2] * 6


def test_only_train_rows_are_kept_and_the_estimate_counts_them(
    monkeypatch: pytest.MonkeyPatch, twins: dict[str, Any], tmp_path: Path
) -> None:
    from loquetier.adapters.methods import dora

    engine, specs = engine_with({"dora": twins["dora"]}, tmp_path, tape="graph")
    kept: list[int] = []
    forward = dora.Dora.forward

    def counted(self: Any, *args: Any) -> Any:
        found = forward(self, *args)
        kept.append(sum(t.nbytes for t in found))
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in found), "a view keeps the other rows alive"
        return found

    monkeypatch.setattr(dora.Dora, "forward", counted)
    job = continue_from(engine, "job", specs["dora"], ONE_STEP, DATA, "dora")
    ask(engine, "dora", range(10, 22), 6)
    per_row = 4 * engine.admission._admitted[job.job_id].kept
    report = engine.step()
    assert report.train_rows == sum(e.num_rows for e in DATA) and report.prefill_rows == 12
    assert sum(kept) == report.train_rows * per_row > 0
    run(engine)


@pytest.mark.parametrize("family", ["phi3", "gemma2", "qwen3_moe"])
def test_other_families(family: str, tmp_path: Path) -> None:
    """Fused q|k|v, soft caps and norms after linears, experts beside: logits and gradients."""
    base = tiny_model(family)
    names = ["qkv_proj", "down_proj"] if family == "phi3" else ["q_proj", "v_proj", "o_proj"]
    configs = {
        "dora": LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=names, use_dora=True),
        "ia3": IA3Config(task_type="CAUSAL_LM", target_modules=names, feedforward_modules=names[1:]),
    }
    twins = {name: peft_adapter(base, config, 5) for name, config in configs.items()}
    engine = make_engine(family, adapter_memory=16 * MIB)
    specs = {name: load(engine, name, twin, tmp_path / name) for name, twin in twins.items()}
    recorder = LogitRecorder(engine)
    with checked(engine):
        jobs = [continue_from(engine, f"job-{name}", specs[name], ONE_STEP, DATA, name) for name in configs]
        slots = [engine.registry.resolve(name).slot for name in configs]
        for name in configs:
            ask(engine, name, range(10, 22), 4)
        for name, slot, flat in zip(configs, slots, first_gradients(engine, jobs), strict=True):
            assert relative_norm(slot_tensors(engine, slot, flat), gradients(twins[name], DATA)) < GRADIENT_RTOL, name
        run(engine)
        oracles = dict(zip(slots, twins.values(), strict=True))
        for seq, ours in recorder.results():
            assert max_error(ours, reference_logits(oracles[seq.slot], seq.tokens[:-1])) <= FP32_TOLERANCE


@pytest.mark.parametrize("name", ["dora", "ia3", "ia3-siblings"])
def test_a_bfloat16_base_with_float32_adapters(name: str, twins: dict[str, Any], tmp_path: Path) -> None:
    """As they meet on a CPU: logits and gradients are the float32 ones up to bfloat16's rounding."""
    engine = helpers.make_engine(tiny_model("qwen2").bfloat16(), tape="graph")
    assert engine.arena.dtype == torch.float32 and engine.base.dtype == torch.bfloat16
    spec = load(engine, name, twins[name], tmp_path / name)
    job = continue_from(engine, "job", spec, ONE_STEP, DATA, name)
    slot = engine.registry.resolve(name).slot
    recorder = LogitRecorder(engine)
    helpers.ask(engine, prompt_of(20, 3), name, max_tokens=1)
    (flat,) = first_gradients(engine, [job])
    ours = torch.cat([t.flatten() for t in slot_tensors(engine, slot, flat).values()])
    theirs = torch.cat([gradients(twins[name], DATA)[key].flatten() for key in slot_tensors(engine, slot)])
    # bfloat16 rounds at 2**-9 an operation, and noise-like weights magnify it.
    # A wrong factor or a lost row turns the gradient elsewhere.
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.99
    helpers.run(engine)
    logits = recorder.results()[0][1]
    expected = reference_logits(twins[name], prompt_of(20, 3))
    assert float((logits - expected).norm() / expected.norm()) < 0.05
