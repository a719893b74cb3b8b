"""What PEFT saves, we read with PEFT's own modules, ranks and scales; what we write, PEFT loads to the same logits."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from loquetier.adapters.peft_io import AdapterWeights, read_adapter, write_adapter
from loquetier.adapters.spec import LinearTarget, LoraSpec, resolve_modules
from loquetier.errors import AdapterMismatchError, UnsupportedAdapterError

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
CASES: dict[str, dict[str, Any]] = {
    "suffixes": {"target_modules": ["q_proj", "v_proj"]},
    "down_proj_only": {"target_modules": ["down_proj"], "r": 3, "lora_alpha": 7},
    "partial_suffix": {"target_modules": ["self_attn.q_proj", "model.layers.1.mlp.up_proj"]},
    "rslora": {"target_modules": ATTENTION, "r": 5, "lora_alpha": 16, "use_rslora": True},
    "all_linear": {"target_modules": "all-linear", "r": 4},
    "all_linear_excluding": {"target_modules": "All-Linear", "exclude_modules": ["mlp.down_proj", "k_proj"]},
    "exclude_regex": {"target_modules": ATTENTION, "exclude_modules": r".*layers\.0\..*"},
    "regex": {"target_modules": r"model\.layers\.\d+\.(self_attn|mlp)\.(q_proj|up_proj)"},
    "regex_flags": {"target_modules": r"(?i).*\.Q_PROJ"},
    "patterns": {
        "target_modules": "all-linear",
        "r": 4,
        "lora_alpha": 6,
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 7, "model.layers.0.mlp.up_proj": 1},
        "alpha_pattern": {"q_proj": 3, "up_proj|down_proj": 0.5},
    },
    "layers": {"target_modules": ["q_proj", "model.layers.0.self_attn.v_proj"], "layers_to_transform": [1]},
    "layers_int_pattern": {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    "layers_pattern_list": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [0, 1],
        "layers_pattern": ["h", "layers"],
    },
    "no_task_type": {"target_modules": ["q_proj"], "task_type": None},
    "dropout": {"target_modules": ["q_proj"], "lora_dropout": 0.25},
    "orthogonal": {"target_modules": ["q_proj"], "r": 4, "init_lora_weights": "orthogonal"},
}


def tiny_model(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def linear_targets(model: nn.Module, with_head: bool = True) -> list[LinearTarget]:
    found = []
    for path, module in model.named_modules():
        layer = re.search(r"layers\.(\d+)\.", path)
        if isinstance(module, nn.Linear) and (layer or with_head):
            found.append(
                LinearTarget(
                    path, len(found), module.in_features, module.out_features, int(layer[1]) if layer else None
                )
            )
    return found


def peft_model(**settings: Any) -> PeftModel:
    model = get_peft_model(tiny_model(), LoraConfig(**{"task_type": "CAUSAL_LM", **settings})).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def peft_layers(model: PeftModel) -> dict[str, tuple[int, float]]:
    """PEFT's own rank and scale by module path."""
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix): (module.r["default"], module.scaling["default"])
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "scaling")
    }


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=torch.arange(12).reshape(2, 6)).logits


def load_strictly(directory: Path) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)  # deprecations between the libraries, not about the adapter
        return PeftModel.from_pretrained(tiny_model(), directory).eval()


def write_again(adapter: AdapterWeights, directory: Path) -> str:
    return write_adapter(
        directory,
        spec=adapter.spec,
        modules=adapter.modules,
        factors=adapter.factors,
        base_name=adapter.base_name,
    )


def assert_same(one: AdapterWeights, other: AdapterWeights) -> None:
    assert one.spec == other.spec
    assert list(one.spec.rank_pattern) == list(other.spec.rank_pattern)  # order decides between overlapping keys
    assert one.modules == other.modules
    assert one.factors.keys() == other.factors.keys()
    for path, factors in one.factors.items():
        for mine, theirs in zip(factors, other.factors[path], strict=True):
            assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)


@pytest.mark.parametrize("case", CASES)
def test_reads_what_peft_saves_and_peft_loads_what_we_write(case: str, tmp_path: Path) -> None:
    model = peft_model(**CASES[case])
    model.save_pretrained(tmp_path / "peft")
    targets = linear_targets(tiny_model())
    adapter = read_adapter(tmp_path / "peft", targets)
    found = {plan.target.path: (plan.rank, plan.scale) for plan in adapter.modules}
    assert found == peft_layers(model)
    for path, (a, b) in adapter.factors.items():
        layer = model.get_submodule(f"base_model.model.{path}")
        assert torch.equal(a, layer.lora_A["default"].weight) and torch.equal(b, layer.lora_B["default"].weight)

    digest = write_again(adapter, tmp_path / "ours")
    again = read_adapter(tmp_path / "ours", targets)
    assert_same(adapter, again)
    assert again.digest == digest
    ours, theirs = load_strictly(tmp_path / "ours"), PeftModel.from_pretrained(tiny_model(), tmp_path / "peft").eval()
    assert torch.equal(logits(ours), logits(theirs))
    assert not torch.equal(logits(ours), logits(tiny_model()))


@pytest.mark.parametrize("case", CASES)
def test_resolve_modules_agrees_with_peft_before_saving(case: str) -> None:
    settings = CASES[case]
    layers, pattern = settings.get("layers_to_transform"), settings.get("layers_pattern", [])
    names, exclude = settings["target_modules"], settings.get("exclude_modules", ())
    spec = LoraSpec(
        r=settings.get("r", 8),
        alpha=settings.get("lora_alpha", 8),
        target_modules=names if isinstance(names, str) else tuple(names),
        exclude_modules=exclude if isinstance(exclude, str) else tuple(exclude),
        use_rslora=settings.get("use_rslora", False),
        rank_pattern=settings.get("rank_pattern", {}),
        alpha_pattern=settings.get("alpha_pattern", {}),
        layers_to_transform=(layers,) if isinstance(layers, int) else layers and tuple(layers),
        layers_pattern=(pattern,) if isinstance(pattern, str) else tuple(pattern),
    )
    plans = resolve_modules(spec, linear_targets(tiny_model()))
    assert {plan.target.path: (plan.rank, plan.scale) for plan in plans} == peft_layers(peft_model(**settings))
    assert [plan.target.index for plan in plans] == sorted(plan.target.index for plan in plans)


@pytest.mark.parametrize(
    "spec",
    [
        LoraSpec(),
        LoraSpec(r=3, alpha=2.5, target_modules=r".*\.(q|k)_proj", rank_pattern={r"layers\.1\..*": 2, "k_proj": 5}),
        LoraSpec(target_modules="all-linear", exclude_modules=("q_proj",), use_rslora=True, dropout=0.1),
        LoraSpec(target_modules=("v_proj", "q_proj"), layers_to_transform=(1,), layers_pattern=("layers",)),
        LoraSpec(target_modules=("lm_head", "q_proj"), alpha_pattern={"lm_head": 1.5}),
    ],
)
def test_any_spec_survives_a_round_trip_and_loads_in_peft(spec: LoraSpec, tmp_path: Path) -> None:
    targets = linear_targets(tiny_model())
    modules = resolve_modules(spec, targets)
    torch.manual_seed(2)
    factors = {
        p.target.path: (torch.randn(p.rank, p.target.in_features), torch.randn(p.target.out_features, p.rank))
        for p in modules
    }
    digest = write_adapter(tmp_path / "a", spec=spec, modules=modules, factors=factors, base_name="some/base")
    adapter = read_adapter(tmp_path / "a", targets)
    assert (adapter.spec, adapter.modules, adapter.base_name, adapter.digest) == (spec, modules, "some/base", digest)
    for path, (a, b) in factors.items():
        assert torch.equal(adapter.factors[path][0], a) and torch.equal(adapter.factors[path][1], b)
    model = load_strictly(tmp_path / "a")
    assert peft_layers(model) == {p.target.path: (p.rank, p.scale) for p in modules}


def test_of_overlapping_patterns_the_first_decides_and_pefts_reordering_is_caught(tmp_path: Path) -> None:
    settings = {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 2, r"layers\.1\..*": 7}}
    model = peft_model(**settings)
    spec = LoraSpec(alpha=8, target_modules=("q_proj",), rank_pattern=settings["rank_pattern"])
    targets = linear_targets(tiny_model())
    assert {p.target.path: (p.rank, p.scale) for p in resolve_modules(spec, targets)} == peft_layers(model)
    # PEFT sorts the keys when it saves, which turns layer 1 to rank 7: the file contradicts itself, for PEFT too.
    model.save_pretrained(tmp_path / "peft")
    with pytest.raises(AdapterMismatchError, match=r"layers\.1\.self_attn\.q_proj\.lora_A\.weight: shape \[2, 32\]"):
        read_adapter(tmp_path / "peft", targets)
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(tiny_model(), tmp_path / "peft")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept_as_stored(dtype: torch.dtype, tmp_path: Path) -> None:
    model = peft_model(target_modules=["q_proj"]).to(dtype)
    model.save_pretrained(tmp_path / "peft")
    adapter = read_adapter(tmp_path / "peft", linear_targets(tiny_model()))
    assert {tensor.dtype for factors in adapter.factors.values() for tensor in factors} == {dtype}
    write_again(adapter, tmp_path / "ours")
    assert_same(adapter, read_adapter(tmp_path / "ours", linear_targets(tiny_model())))


def test_lm_head_saved_by_peft_carries_a_base_copy_that_must_equal_the_base(tmp_path: Path) -> None:
    model = peft_model(target_modules=["q_proj", "lm_head"])
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        model.save_pretrained(tmp_path / "peft")
    base = tiny_model()
    targets = linear_targets(base)
    with pytest.raises(UnsupportedAdapterError, match=r"lm_head\.base_layer\.weight.*save_embedding_layers=False"):
        read_adapter(tmp_path / "peft", targets)
    adapter = read_adapter(tmp_path / "peft", targets, base_weight=lambda path: base.get_submodule(path).weight)
    assert {p.target.path: (p.rank, p.scale) for p in adapter.modules} == peft_layers(model)
    write_again(adapter, tmp_path / "ours")
    assert torch.equal(logits(load_strictly(tmp_path / "ours")), logits(model))
    with pytest.raises(AdapterMismatchError, match=r"lm_head\.base_layer\.weight: differs"):
        read_adapter(tmp_path / "peft", targets, base_weight=lambda path: base.get_submodule(path).weight + 1)


def test_lm_head_of_a_tied_base_is_refused_naming_the_tie(tmp_path: Path) -> None:
    model = peft_model(target_modules=["q_proj", "lm_head"])
    model.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    with pytest.raises(AdapterMismatchError, match=r"lm_head.*tied to the input embedding"):
        read_adapter(tmp_path / "peft", linear_targets(tiny_model(tied=True), with_head=False))


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"layer_replication": [(0, 2), (1, 2)]}, "layer_replication"),
    ],
)
def test_what_peft_saves_with_a_feature_we_do_not_honour_is_refused_by_key(
    settings: dict[str, Any], key: str, tmp_path: Path
) -> None:
    peft_model(target_modules=["q_proj"], **settings).save_pretrained(tmp_path / "peft")
    with pytest.raises(UnsupportedAdapterError, match=rf"\b{key}="):
        read_adapter(tmp_path / "peft", linear_targets(tiny_model()))


def test_a_wrong_base_is_refused_with_its_name_and_shapes(tmp_path: Path) -> None:
    peft_model(target_modules=["q_proj"]).save_pretrained(tmp_path / "peft")
    config = tmp_path / "peft" / "adapter_config.json"
    config.write_text(config.read_text().replace('"base_model_name_or_path": null', '"base_model_name_or_path": "a/b"'))
    targets = linear_targets(tiny_model())
    assert read_adapter(tmp_path / "peft", targets, base_names=["c/d"]).base_name == "a/b"
    wider = [LinearTarget(t.path, t.index, t.in_features * 2, t.out_features, t.layer) for t in targets]
    with pytest.raises(AdapterMismatchError, match=r"q_proj\.lora_A\.weight: shape \[8, 32\].*\[8, 64\].*'a/b'.*'c/d'"):
        read_adapter(tmp_path / "peft", wider, base_names=["c/d"])


@pytest.mark.parametrize(("name", "config"), [("lora", LoraConfig), ("dora", LoraConfig), ("ia3", IA3Config)])
def test_every_key_of_pefts_config_is_classified(name: str, config: type[Any]) -> None:
    from dataclasses import fields

    from loquetier.adapters.methods import method_of

    rules = method_of(name).rules
    known = {*rules.required} | rules.honoured | rules.inert | rules.defaults.keys()
    assert {field.name for field in fields(config)} - known == set()
