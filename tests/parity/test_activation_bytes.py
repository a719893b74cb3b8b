"""What a training forward keeps for its backward, in bytes of distinct storages: a saved view keeps its whole storage.

The bound for rows that are not trained is zero bytes, but for the rotary embedding's cos and sin: every layer saves
the same two tensors ``[1, M, head_dim]``, which transformers computes once per forward over all rows. That is
``2 * head_dim * itemsize`` bytes per row, once for the model, whatever its depth.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from tests.parity.training_helpers import MIB, Engine, ask, make_engine, random_examples, start
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from loquetier.adapters.spec import LoraSpec
from loquetier.config import TrainingConfig

HEAD_DIM, HIDDEN, HEADS, KV_HEADS, FLOAT = 8, 32, 4, 2, 4
COS_AND_SIN = 2 * HEAD_DIM * FLOAT
EXAMPLES = random_examples(2, 15, 15, 1)
NUM_TRAIN = sum(e.num_rows for e in EXAMPLES)


class Kept:
    """Distinct storages that a forward keeps, parameters and KV cache excluded."""

    def __init__(self, engine: Engine) -> None:
        owned: list[Tensor] = [*engine.base.loaded.model.parameters(), *engine.cache.keys, *engine.cache.values]
        self._ignored = {t.untyped_storage().data_ptr() for t in owned}
        self._ignored |= {engine.arena.flat(slot).untyped_storage().data_ptr() for slot in engine.arena.slots}
        self._tensors: list[Tensor] = []  # held, so that no address is used twice

    def add(self, tensors: Iterable[Tensor]) -> None:
        self._tensors.extend(tensors)

    @property
    def storages(self) -> dict[int, int]:
        """Address -> bytes."""
        every = (t.untyped_storage() for t in self._tensors)
        return {s.data_ptr(): s.nbytes() for s in every if s.data_ptr() not in self._ignored}

    @property
    def num_bytes(self) -> int:
        return sum(self.storages.values())


def kept_by_training_forward(family: str, inference_rows: int, **model: Any) -> Kept:
    """Storages kept by the forward of one step: `NUM_TRAIN` TRAIN rows and so many PREFILL and DECODE rows."""
    # The same prompt many times: each is to be computed.
    limits: dict[str, Any] = {"max_rows": 4096, "max_prefill_rows": 4096, "kv_memory": 64 * MIB}
    engine = make_engine(family, model=model, prefix_cache=False, **limits)
    decode = inference_rows // 10
    for number in range(decode):
        ask(engine, "tiny", [20 + number], 9)
    if decode:
        engine.step()
    for start_token in range(0, inference_rows - decode, 30):
        ask(engine, "tiny", range(20, 20 + min(30, inference_rows - decode - start_token)), 2)
    start(engine, "job", LoraSpec(r=4), TrainingConfig(batch_size=2, max_steps=1), EXAMPLES)
    kept = Kept(engine)
    forward = engine.base.hidden

    def measured(*args: Any) -> Tensor:
        def pack(tensor: Tensor) -> Tensor:
            kept.add([tensor])
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            hidden_MD = forward(*args)
        tape = engine.trainer.tape
        assert tape is not None and args[2].num_train == NUM_TRAIN
        assert args[2].num_rows == NUM_TRAIN + inference_rows
        kept.add(unit.leaf for unit in tape._units)
        return hidden_MD

    engine.base.hidden = measured  # type: ignore[method-assign]
    report = engine.step()
    assert (report.train_rows, report.decode_rows, report.prefill_rows) == (
        NUM_TRAIN,
        decode,
        inference_rows - decode,
    )
    return kept


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma2", "phi3", "granite"])
@pytest.mark.parametrize("layers", [2, 4])
def test_inference_rows_keep_nothing_but_cos_and_sin(family: str, layers: int) -> None:
    few = kept_by_training_forward(family, NUM_TRAIN, layers=layers)
    many = kept_by_training_forward(family, 10 * NUM_TRAIN, layers=layers)
    assert many.num_bytes - few.num_bytes == 9 * NUM_TRAIN * COS_AND_SIN


def test_train_rows_keep_the_same_beside_ten_times_as_many_inference_rows() -> None:
    """Also against a step with no inference rows at all: copying the train rows out must not keep more than alone."""
    alone = kept_by_training_forward("llama", 0, layers=4)
    mixed = kept_by_training_forward("llama", 10 * NUM_TRAIN, layers=4)
    assert mixed.num_bytes <= alone.num_bytes + 10 * NUM_TRAIN * COS_AND_SIN


def test_bytes_per_train_row() -> None:
    """What a layer keeps per row, item by item. Nothing of LoRA's rank is on the list: S = x A^T is computed again."""
    kept = {layers: kept_by_training_forward("llama", 10 * NUM_TRAIN, layers=layers) for layers in (2, 4)}
    per_row = (kept[4].num_bytes - kept[2].num_bytes) / 2 / NUM_TRAIN
    q, kv, mlp = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, 2 * HIDDEN
    leaf, norms, linear_inputs = HIDDEN, 2 * HIDDEN, HIDDEN + q + HIDDEN + mlp  # qkv, o, gate|up, down
    attention = q + 2 * kv + q + HEADS  # q, k, v, output, log-sum-exp
    gated = 2 * mlp
    assert per_row == FLOAT * (leaf + norms + linear_inputs + attention + gated)


def test_routed_experts_keep_inference_rows_too() -> None:
    """The honest bound of mixture-of-experts models: transformers' own experts run over all rows under autograd.

    They gather rows by expert, so their inputs cannot be cut to the train rows. Measured: 1520 bytes per inference row
    on two tiny layers, where a train row keeps 4113 (dense parts, 4 bytes a float).
    """
    few = kept_by_training_forward("qwen3_moe", NUM_TRAIN, layers=2)
    many = kept_by_training_forward("qwen3_moe", 10 * NUM_TRAIN, layers=2)
    per_inference_row = (many.num_bytes - few.num_bytes) / (9 * NUM_TRAIN)
    assert COS_AND_SIN < per_inference_row < 0.4 * (few.num_bytes / NUM_TRAIN - per_inference_row)
