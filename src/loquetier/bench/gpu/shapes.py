"""What is measured: a base's shape with random weights, and the amounts of work."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from loquetier.base.loading import LoadedBase
from loquetier.base.model import Base
from loquetier.config import MIB, EngineConfig, Hardware, resolve
from loquetier.engine.engine import Engine


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A Llama, and how much work each section gives it."""

    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    context: int
    dtype: torch.dtype
    device: str
    streams: int
    """Of the 4-adapter measure; twice as many for the mixed one."""
    new_tokens: int
    prompt: tuple[int, int]
    """Shortest and longest."""
    train_tokens: int
    """Per example; all alike, so that nobody pads."""
    train_batch: int
    train_steps: int
    ranks: tuple[int, ...]
    rounds: int
    gemm: int
    """Side of the square GEMM whose rate is the roofline."""
    copy_bytes: int
    kv_memory: int
    adapter_memory: int
    train_memory: int

    @property
    def linear_weights(self) -> int:
        """Weights of the layers' linears and lm_head: what a token is multiplied by."""
        head = self.hidden // self.heads
        per_layer = self.hidden * head * (2 * self.heads + 2 * self.kv_heads) + 3 * self.hidden * self.inner
        return self.layers * per_layer + self.vocab * self.hidden


LLAMA_3_8B = Shape(
    name="llama-3-8b shape, random weights", hidden=4096, inner=14336, layers=32, heads=32, kv_heads=8, vocab=128256,
    context=8192, dtype=torch.bfloat16, device="cuda", streams=16, new_tokens=64, prompt=(32, 200), train_tokens=513,
    train_batch=8, train_steps=6, ranks=(4, 8, 16, 32, 64), rounds=3, gemm=8192, copy_bytes=2 << 30,
    kv_memory=8 << 30, adapter_memory=12 << 30, train_memory=64 << 30,
)  # fmt: skip
"""https://huggingface.co/meta-llama/Meta-Llama-3-8B config.json, without its weights."""
TINY = Shape(
    name="tiny, dry run: no measurement", hidden=32, inner=64, layers=2, heads=4, kv_heads=2, vocab=300, context=256,
    dtype=torch.float32, device="cpu", streams=4, new_tokens=4, prompt=(3, 9), train_tokens=9, train_batch=2,
    train_steps=2, ranks=(4, 8), rounds=1, gemm=64, copy_bytes=1 << 16,
    kv_memory=4 * MIB, adapter_memory=8 * MIB, train_memory=64 * MIB,
)  # fmt: skip


def random_model(shape: Shape, seed: int = 0) -> Any:
    """A Llama of this shape, its weights drawn where they will lie."""
    config = transformers.LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.context,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    with torch.device("meta"):
        model: Any = transformers.LlamaForCausalLM(config)
    model = model.to(shape.dtype).to_empty(device=shape.device)
    generator = torch.Generator(shape.device).manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.02, generator=generator)
    # Its frequencies are a buffer, computed when it is made, and were lost on the way through "meta".
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(shape.device)
    return model.eval().requires_grad_(False)


def new_engine(shape: Shape, model: Any, **settings: Any) -> Engine:
    """An engine on `model`, which it takes over; `settings` go to EngineConfig."""
    parameters = list(model.parameters())
    loaded = LoadedBase(
        model=model, tokenizer=None, name="base", source=Path("."), max_context=shape.context,
        eos_token_ids=frozenset(), num_parameters=sum(p.numel() for p in parameters),
        weight_bytes=sum(p.numel() * p.element_size() for p in parameters),
    )  # fmt: skip
    chosen: dict[str, Any] = {
        "device": shape.device, "dtype": str(shape.dtype).removeprefix("torch."), "kv_memory": shape.kv_memory,
        "adapter_memory": shape.adapter_memory, "train_memory": shape.train_memory, "max_rows": 8192,
        "max_prefill_rows": 4096, "max_train_rows": 8192,
    }  # fmt: skip
    has_cuda = torch.cuda.is_available()
    hardware = Hardware(has_cuda=has_cuda, cpu_bf16_fast=False, free_memory=shape.kv_memory)
    return Engine(Base(loaded), resolve(EngineConfig(**(chosen | settings)), hardware))


def wait(shape: Shape) -> None:
    """Until the device has done everything."""
    if shape.device.startswith("cuda"):
        torch.cuda.synchronize()
