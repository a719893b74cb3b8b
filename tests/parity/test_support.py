"""The load gate on tiny models of each family, and the linears that adapters may sit on."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tests.tiny import FAMILIES, REFUSED, refused_model, tiny_model
from torch import nn

from loquetier.base.support import check_config, check_supported, decoder_layers, decoder_stack, linear_targets
from loquetier.errors import UnsupportedModelError

ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
MLP = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
PER_LAYER = {
    "phi3": ["self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj"],
    # Experts are 3-D parameters and the router is no nn.Linear: only attention takes adapters.
    "qwen3_moe": ATTENTION,
}

REASONS = {
    "gpt2": ("gpt2", "Conv1D"),
    "dynamic_rope": ("llama", "'dynamic'"),
    "longrope": ("phi3", "'longrope'"),
    "mamba2": ("mamba2", "linear_attention|recurrent"),
    "qwen3_next": ("qwen3_next", "linear_attention"),
    "deepseek_v3": ("deepseek_v3", "latent attention"),
    "gpt_oss": ("gpt_oss", "sinks"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_supported_families_pass(family: str) -> None:
    model = tiny_model(family)
    check_supported(model)
    assert len(decoder_layers(model)) == 2
    assert decoder_stack(model) is model.model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gate_needs_no_weights(family: str) -> None:
    with torch.device("meta"):
        skeleton = type(tiny_model(family))(tiny_model(family).config)
    check_supported(skeleton)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_targets_are_the_layers_linears_in_module_order(family: str, tie: bool) -> None:
    model = tiny_model(family, layers=3, tie=tie)
    targets = linear_targets(model)
    names = PER_LAYER.get(family, ATTENTION + MLP)
    expected = [f"model.layers.{i}.{name}" for i in range(3) for name in names] + ([] if tie else ["lm_head"])
    assert [t.path for t in targets] == expected
    assert [t.index for t in targets] == list(range(len(expected)))
    assert [t.layer for t in targets] == [i for i in range(3) for _ in names] + ([] if tie else [None])
    for target in targets:
        linear = model.get_submodule(target.path)
        assert isinstance(linear, nn.Linear)
        assert (target.out_features, target.in_features) == tuple(linear.weight.shape)


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_by_name_and_reason(kind: str) -> None:
    name, reason = REASONS[kind]
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        check_supported(refused_model(kind))
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"text_config": SimpleNamespace()}, "multimodal"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"layer_types": ["chunked_attention", "full_attention"]}, "chunked_attention"),
        ({"layers_block_type": ["mamba", "attention"]}, "mamba"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "dynamic"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "longrope"}, "sliding_attention": {}}},
            "longrope",
        ),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"hidden_size_per_layer_input": 8}, "per-layer inputs"),
        ({"num_kv_shared_layers": 1}, "share another layer"),
        ({"use_bidirectional_attention": True}, "bidirectional"),
    ],
)
def test_config_alone_is_refused(fields: dict[str, object], reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        check_config(SimpleNamespace(model_type="made_up", **fields))


@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "yarn"])
def test_rope_that_depends_only_on_the_position_is_kept(kind: str) -> None:
    check_config(SimpleNamespace(model_type="made_up", rope_parameters={"rope_type": kind}))


def test_model_without_the_attention_interface_is_refused() -> None:
    model = tiny_model("llama")
    model._supports_attention_backend = False
    with pytest.raises(UnsupportedModelError, match="_supports_attention_backend"):
        check_supported(model)


def test_layer_that_cannot_be_cut_is_refused() -> None:
    class Plain(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.self_attn, self.mlp = inner.self_attn, inner.mlp

    model = tiny_model("llama")
    model.model.layers[1] = Plain(model.model.layers[1])
    with pytest.raises(UnsupportedModelError, match=r"decoder layer 1.*Plain is not a GradientCheckpointingLayer"):
        check_supported(model)


def test_layer_without_a_causal_attention_is_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[0].self_attn.is_causal = False
    with pytest.raises(UnsupportedModelError, match="not causal"):
        check_supported(model)


def test_missing_layers_are_refused() -> None:
    model = tiny_model("llama")
    model.model.layers = model.model.layers[:1]
    with pytest.raises(UnsupportedModelError, match="no list of 2 decoder layers"):
        check_supported(model)


def test_linears_of_routed_experts_are_no_targets() -> None:
    model = tiny_model("llama", tie=True)
    model.model.layers[0].mlp.experts = nn.ModuleList([nn.Linear(4, 4)])
    assert not [t.path for t in linear_targets(model) if "experts" in t.path]


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_models_are_worth_comparing(family: str) -> None:
    """Logits spread over whole units and depend on position and seed, so a parity test on them can fail."""
    torch.manual_seed(0)
    ids = torch.randint(4, 260, (1, 24))
    with torch.no_grad():
        logits = tiny_model(family)(ids).logits[0]
        shuffled = tiny_model(family)(ids.flip(1)).logits[0].flip(0)
        reseeded = tiny_model(family, seed=1)(ids).logits[0]
    assert logits.std() > 0.5
    assert logits.argmax(-1).unique().numel() > 8
    assert (logits - shuffled).abs().mean() > 0.05
    assert (logits - reseeded).abs().mean() > 0.5
