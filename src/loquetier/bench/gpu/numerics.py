"""Is it right on this device: each kernel against its reference, the engine against Hugging Face and autograd."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from loquetier.adapters.arena import factor_views
from loquetier.adapters.spec import LoraSpec, ModulePlan, resolve_modules
from loquetier.bench.gpu import measured, work
from loquetier.bench.gpu.measured import Lora, adapted
from loquetier.bench.gpu.shapes import TINY, Shape, new_engine, random_model
from loquetier.config import SamplingParams
from loquetier.engine.engine import Engine
from loquetier.engine.request import TokenEvent
from loquetier.errors import EngineError
from loquetier.kernels.select import choose_kernels

GRADIENT_TOLERANCE = 2e-3
"""Relative, in float32: a GPU's float32 GEMMs may sum in any order, and Triton's use three TF32 products."""

MEASURED_GRADIENT_TOLERANCE = 0.15
"""The same in bfloat16, whose roundings add up on the way back (0.06 on a CPU); a lost term is of order one."""


def kernels(shape: Shape) -> dict[str, Any]:
    """Each kernel's backend here; making the choice compares every one with its reference.

    Raises:
        EngineError: a kernel disagrees, or a GPU runs without Triton.
    """
    device = torch.device(shape.device).type
    choices = choose_kernels(os.environ, device).choices
    found = {name: {"backend": c.backend, "reason": c.reason} for name, c in choices.items()}
    wrong = [f"{name}: {c.reason}" for name, c in choices.items() if c.fault is not None]
    if device == "cuda" and not any(c.backend == "triton" for c in choices.values()):
        wrong.append("no kernel runs in Triton")
    if wrong:
        raise EngineError("; ".join(wrong))
    return found


def engine(shape: Shape) -> dict[str, Any]:
    """On a small model in float32: greedy tokens of base and adapter against Hugging Face, with and without async
    scheduling and graphs; a job's gradients against autograd's. Then the same on the path and in the dtype that the
    figures are of.

    Raises:
        EngineError: the first difference, in words.
    """
    small = dataclasses.replace(TINY, device=shape.device, hidden=128, inner=256)
    on_gpu = shape.device.startswith("cuda")
    model = _spread(random_model(small))
    prompts = work.prompts(small, 5, seed=7)
    expected = [_greedy(model, p) for p in prompts]
    first: list[list[int]] = []
    modes = [(False, False), (True, False)] + ([(False, True), (True, True)] if on_gpu else [])
    for is_async, with_graphs in modes:
        built = new_engine(small, copy.deepcopy(model), async_scheduling=is_async, cuda_graphs=with_graphs)
        tokens = _served(built, prompts, built.base.name)
        if tokens != expected:
            raise EngineError(f"async={is_async}, graphs={with_graphs}: {tokens} is not Hugging Face's {expected}")
        adapted = _served(built, prompts, *work.load_adapters(built, [8], "a"))
        if is_async or with_graphs:
            if adapted != first:
                raise EngineError(
                    f"async={is_async}, graphs={with_graphs}: an adapter's tokens are {adapted}, not {first}"
                )
        else:
            first = adapted
        if with_graphs and built.decode_graphs is not None and built.decode_graphs.refusal is not None:
            raise EngineError(f"decode steps are not captured: {built.decode_graphs.refusal}")
    error = _gradient_error(small, model, GRADIENT_TOLERANCE)
    as_measured = measured.small_shape(shape)
    model = _spread(random_model(as_measured))
    found = measured.served(as_measured, model, prompts, modes)
    found["gradient_error"] = _gradient_error(as_measured, model, MEASURED_GRADIENT_TOLERANCE)
    return {"modes": len(modes), "prompts": len(prompts), "gradient_error": error, "as_measured": found}


def _spread(model: Any) -> Any:
    """Wider weights: greedy choices are then no ties that rounding could decide."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
    return model


def _greedy(model: Any, prompt: list[int]) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(TINY.new_tokens * 2):
            logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


def _served(built: Engine, prompts: list[list[int]], name: str) -> list[list[int]]:
    tokens: list[list[int]] = [[] for _ in prompts]

    def sink(into: list[int]) -> Callable[[TokenEvent], None]:
        def heard(event: TokenEvent) -> None:
            if event.token_id is not None:
                into.append(event.token_id)

        return heard

    params = SamplingParams(temperature=0, max_tokens=TINY.new_tokens * 2, ignore_eos=True)
    for prompt, into in zip(prompts, tokens, strict=True):
        built.add_request(prompt, name, params, sink(into))
    while built.has_work:
        built.step()
    built.check_integrity()
    return tokens


def _gradient_error(shape: Shape, model: Any, tolerance: float) -> float:
    """Largest relative difference of a job's gradient of one factor to that of autograd in float64."""
    built = new_engine(shape, copy.deepcopy(model))
    rows = work.examples(shape, shape.train_batch)
    work.start_job(built, "job", rows, shape.train_batch, 1)
    (job,) = built.trainer.jobs.values()
    modules = resolve_modules(LoraSpec(r=8, alpha=16.0), built.base.targets)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():  # B starts at zero, which would hide A's gradient
        flat = built.arena.flat(job.slot)
        flat.copy_(0.05 * torch.randn(flat.shape, generator=generator))
    caught: dict[str, Tensor] = {}
    optimizer = job.optimizer
    step = type(optimizer).step

    def caught_step(lr: float) -> float:
        caught["grad"] = optimizer.grad.clone()
        return step(optimizer, lr)

    optimizer.step = caught_step  # type: ignore[method-assign]
    factors = measured.lora_of(built, job.slot)
    leaves = {path: (a.clone().requires_grad_(), b.clone().requires_grad_(), s) for path, (a, b, s) in factors.items()}
    expected = _autograd(copy.deepcopy(model).double(), leaves, rows)
    work.run(built, shape)
    views = _by_path(caught["grad"], modules)
    errors = [
        float((ours - theirs).norm() / theirs.norm().clamp(min=1e-12))
        for path in leaves
        for ours, theirs in zip(views[path], expected[path], strict=True)
    ]
    if not max(errors) < tolerance:
        raise EngineError(f"a gradient differs from autograd's by {max(errors):.1e} of its norm")
    return max(errors)


def _by_path(flat: Tensor, modules: tuple[ModulePlan, ...]) -> dict[str, tuple[Tensor, Tensor]]:
    """A flat gradient by module path."""
    views = factor_views(flat, modules)
    return {m.target.path: (views[m.target.index].a_RK, views[m.target.index].b_RN) for m in modules}


def _autograd(model: Any, leaves: Lora, rows: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Plain autograd through the original model and its adapter; mean loss over all labels."""
    ids_BT = torch.tensor([e.tokens for e in rows], device=model.device)
    with adapted(model, leaves):
        logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
    loss = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1).double(), ids_BT[:, 1:].flatten())
    paths = list(leaves)
    grads = torch.autograd.grad(loss, [factor for path in paths for factor in leaves[path][:2]])
    return {path: (grads[2 * i], grads[2 * i + 1]) for i, path in enumerate(paths)}
