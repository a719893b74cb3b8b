"""The path that is measured, in the dtype that is measured, on a small model: held against Hugging Face in float64."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from loquetier.bench.gpu import work
from loquetier.bench.gpu.shapes import LLAMA_3_8B, TINY, Shape, new_engine
from loquetier.config import SamplingParams
from loquetier.engine.engine import Engine
from loquetier.engine.request import TokenEvent
from loquetier.errors import EngineError

WORSE = 3.0
"""The largest error of a log-probability may be so many times that of Hugging Face's own code in the same dtype, which
rounds at other places. Logits spread by 2 to 3: another row, mask, adapter or layer gives whole units."""
LEAST = 0.1
"""An error that is always allowed: of few tokens, Hugging Face's own may be small by luck."""

Lora = Mapping[str, tuple[Tensor, Tensor, float]]
"""Path of a linear -> A [R, K], B [R, N] (transposed), scale."""


def small_shape(shape: Shape) -> Shape:
    """A model of two layers, on the device and in the dtype of the figures; a dry run takes their dtype too."""
    dtype = LLAMA_3_8B.dtype if shape is TINY else shape.dtype
    return dataclasses.replace(TINY, device=shape.device, dtype=dtype, hidden=128, inner=256)


def served(small: Shape, model: Any, prompts: list[list[int]], modes: list[tuple[bool, bool]]) -> dict[str, Any]:
    """Base and adapter in every mode (async scheduling, graphs); the largest error of a token's log-probability.

    Raises:
        EngineError: the fused stack is not what runs, or an error is larger than what WORSE and LEAST allow.
    """
    exact = copy.deepcopy(model).double()
    worst = (0.0, 0.0)
    for is_async, with_graphs in modes:
        built = new_engine(small, copy.deepcopy(model), async_scheduling=is_async, cuda_graphs=with_graphs)
        fused = _must_be_fused(built, small)
        for name in (built.base.name, *work.load_adapters(built, [8], "a")):
            lora = {} if name == built.base.name else lora_of(built, built.registry.resolve(name).slot)
            error, own = _errors(exact, model, lora, prompts, _answers(built, prompts, name))
            if not error <= max(WORSE * own, LEAST):  # NaN fails too
                raise EngineError(
                    f"async={is_async}, graphs={with_graphs}, {name}: a token's log-probability is {error:.2g} off, "
                    f"Hugging Face's own {own:.2g}"
                )
            worst = max(worst, (error, own))
    dtype = str(small.dtype).removeprefix("torch.")
    return {"dtype": dtype, "path": fused, "logprob_error": worst[0], "hugging_face_logprob_error": worst[1]}


def _must_be_fused(built: Engine, small: Shape) -> str:
    base = built.base
    if base.fused is None and (small.device.startswith("cuda") or base.packed_bytes):
        raise EngineError("a Llama does not run on the fused stack: the figures would be of something else")
    if base.fused is None:
        return "the model's own code: no kernels of the base on this processor"
    return "fused stack" if base.decode_stack is None else "fused stack, one C call"


def lora_of(built: Engine, slot: int) -> Lora:
    """The factors in a slot, in float64."""
    factors = built.arena.factors[slot]
    found = {t.path: factors[t.index] for t in built.base.targets if t.index in factors}
    return {path: (f.a_RK.double(), f.b_RN.double(), f.scale) for path, f in found.items()}


@contextmanager
def adapted(model: Any, lora: Lora) -> Iterator[None]:
    """``x W^T + scale (x A^T) B^T`` in the linears of Hugging Face's model."""
    handles = []
    for path, (a_RK, b_RN, scale) in lora.items():

        def add(_m: Any, args: Any, y: Tensor, a: Tensor = a_RK, b: Tensor = b_RN, s: float = scale) -> Tensor:
            x: Tensor = args[0]
            return (y + s * (x.to(a.dtype) @ a.T) @ b).to(y.dtype)

        handles.append(model.get_submodule(path).register_forward_hook(add))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _answers(built: Engine, prompts: list[list[int]], name: str) -> list[list[tuple[int, float]]]:
    """Greedy tokens and their log-probabilities."""
    answers: list[list[tuple[int, float]]] = [[] for _ in prompts]
    params = SamplingParams(temperature=0, max_tokens=2 * TINY.new_tokens, ignore_eos=True, logprobs=0)
    for prompt, into in zip(prompts, answers, strict=True):

        def heard(event: TokenEvent, into: list[tuple[int, float]] = into) -> None:
            if event.error is not None:
                raise event.error
            if event.token_id is not None and event.logprob is not None:
                into.append((event.token_id, event.logprob))

        built.add_request(prompt, name, params, heard)
    while built.has_work:
        built.step()
    built.check_integrity()
    if any(len(answer) != params.max_tokens for answer in answers):
        raise EngineError(f"{name}: {[len(a) for a in answers]} tokens of {params.max_tokens} each")
    return answers


def _errors(
    exact: Any, own: Any, lora: Lora, prompts: list[list[int]], answers: list[list[tuple[int, float]]]
) -> tuple[float, float]:
    """Largest difference to `exact`'s log-probability of a token after the same ones: of the answers', of `own`'s."""
    ours, theirs = 0.0, 0.0
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = [*prompt, *(token for token, _ in answer)]
        right_N, own_N = (_logprobs(model, lora, ids, len(prompt)) for model in (exact, own))
        said_N = torch.tensor([logprob for _, logprob in answer], dtype=torch.double, device=right_N.device)
        ours = max(ours, float((said_N - right_N).abs().max()))
        theirs = max(theirs, float((own_N - right_N).abs().max()))
        if bool(said_N.isnan().any()):
            return math.nan, theirs
    return ours, theirs


def _logprobs(model: Any, lora: Lora, ids: list[int], first: int) -> Tensor:
    """Of the tokens from `first` on, each after those before it, ``[N]`` in float64."""
    ids_T = torch.tensor(ids, device=model.device)
    with torch.no_grad(), adapted(model, lora):
        logits_TV = model(input_ids=ids_T[None], use_cache=False).logits[0].double()
    logprobs_N: Tensor = logits_TV[first - 1 : -1].log_softmax(dim=-1).gather(1, ids_T[first:, None])[:, 0]
    return logprobs_N
