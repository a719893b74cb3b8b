"""Rotary and KV write in one C call where layers run the model's own code: the model's own bits, or not at all."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.parity.helpers import EngineFactory, LogitRecorder, ask, new_engine, prompt_of, run
from tests.tiny import FAMILIES, tiny_model
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaAttention

from loquetier.base import attention
from loquetier.base.attention import unified_attention
from loquetier.engine.engine import Engine
from loquetier.kernels.select import process_kernels

__all__ = ["new_engine"]

pytestmark = pytest.mark.skipif(process_kernels().native("kv_write") is None, reason="no C kernels here")


def deferred(engine: Engine) -> list[bool]:
    """Of each layer, whether its attention has a forward of its own."""
    return ["forward" in vars(layer.self_attn) for layer in engine.base._layers]


def without(engine: Engine) -> Engine:
    for layer in engine.base._layers:
        del layer.self_attn.forward  # type: ignore[union-attr]
    return engine


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_it_and_gives_the_same_bits(
    family: str, new_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts in chunks and decode rows together; the other engine turns with the model's own code."""

    def results(engine: Engine) -> list[Tensor]:
        recorder = LogitRecorder(engine)
        for i, length in enumerate((3, 30, 17)):
            ask(engine, prompt_of(length, i), max_tokens=6, ignore_eos=True, logit_bias={5 + i: 100.0})
        run(engine)
        engine.check_integrity()
        return [logits for _, logits in recorder.results()]

    calls: list[bool] = []
    turned = attention._turned

    def counted(*args: Any) -> bool:
        calls.append(turned(*args))
        return calls[-1]

    monkeypatch.setattr(attention, "_turned", counted)
    model = tiny_model(family)
    ours, theirs = (new_engine(copy.deepcopy(model), page_size=4, max_prefill_rows=11) for _ in range(2))
    assert all(deferred(ours))
    own = results(ours)
    assert any(calls), "K and V were written with it"
    calls.clear()
    for a, b in zip(own, results(without(theirs)), strict=True):
        assert torch.equal(a, b)
    assert not any(calls)


def test_what_is_done_behind_the_rotary_keeps_it_away(new_engine: EngineFactory) -> None:
    """A model that scales its turned queries: the attention must not get others."""
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn.__class__ = Scaled
    engine = new_engine(model)
    assert not any(deferred(engine))
    answer = ask(engine, prompt_of(9, 1), max_tokens=3, ignore_eos=True)
    run(engine)
    assert len(answer.tokens()) == 3


def test_angles_of_another_kind_keep_it_away(new_engine: EngineFactory) -> None:
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn.__class__ = Interleaved
    assert not any(deferred(new_engine(model)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pages_of_a_request_that_is_gone_do_not_count(new_engine: EngineFactory, dtype: torch.dtype) -> None:
    """No page is cleared any more: what an earlier request left there must not be seen, by chunks neither."""
    engine = new_engine(tiny_model("granite").to(dtype), page_size=4, max_prefill_rows=5, prefix_cache=False)
    assert all(deferred(engine))
    first = ask(engine, prompt_of(13, 1), max_tokens=15, ignore_eos=True)
    run(engine)
    for cache in (*engine.cache.keys, *engine.cache.values):
        cache[1:] = torch.nan
    second = ask(engine, prompt_of(13, 1), max_tokens=15, ignore_eos=True)
    run(engine)
    assert second.tokens() == first.tokens() and len(first.tokens()) == 15


def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Neighbours turn together."""

    def turned(x: Tensor) -> Tensor:
        return torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)

    cos, sin = cos[:, None], sin[:, None]
    return q * cos + turned(q) * sin, k * cos + turned(k) * sin


class Interleaved(LlamaAttention):
    def forward(self, hidden_states: Tensor, position_embeddings: Any, attention_mask: Any, **kwargs: Any) -> Any:
        q, k, v = (
            p(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        out, _ = unified_attention(self, q, k, v, None, scaling=self.scaling, **kwargs)
        return self.o_proj(out.flatten(2)), None


class Scaled(LlamaAttention):
    def forward(self, hidden_states: Tensor, position_embeddings: Any, attention_mask: Any, **kwargs: Any) -> Any:
        q, k, v = (
            p(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        out, _ = unified_attention(self, q * 1.5, k, v, None, scaling=self.scaling, **kwargs)
        return self.o_proj(out.flatten(2)), None
