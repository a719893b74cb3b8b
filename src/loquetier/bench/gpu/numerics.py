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
from loquetier.bench.gpu import work
from loquetier.bench.gpu.shapes import TINY, Shape, new_engine, random_model
from loquetier.config import SamplingParams
from loquetier.engine.engine import Engine
from loquetier.engine.request import TokenEvent
from loquetier.errors import EngineError
from loquetier.kernels.select import choose_kernels

GRADIENT_TOLERANCE = 2e-3
"""Relative, in float32: a GPU's float32 GEMMs may sum in any order, and Triton's use three TF32 products."""


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
    scheduling and graphs; a job's gradients against autograd's.

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
        found = _served(built, prompts, built.base.name)
        if found != expected:
            raise EngineError(f"async={is_async}, graphs={with_graphs}: {found} is not Hugging Face's {expected}")
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
    return {"modes": len(modes), "prompts": len(prompts), "gradient_error": _gradient_error(small, model)}


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


def _gradient_error(shape: Shape, model: Any) -> float:
    """Largest relative difference of a job's gradient, layer inputs and all, to autograd's through merged weights."""
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
    factors = {m.target.path: built.arena.factors[job.slot][m.target.index] for m in modules}
    leaves = {
        path: (f.a_RK.detach().clone().requires_grad_(), f.b_RN.detach().clone().requires_grad_(), f.scale)
        for path, f in factors.items()
    }
    expected = _autograd(model, leaves, rows)
    work.run(built, shape)
    views = _by_path(caught["grad"], modules)
    errors = [
        float((ours - theirs).norm() / theirs.norm().clamp(min=1e-12))
        for path in leaves
        for ours, theirs in zip(views[path], expected[path], strict=True)
    ]
    if not max(errors) < GRADIENT_TOLERANCE:
        raise EngineError(f"a gradient differs from autograd's by {max(errors):.1e} of its norm")
    return max(errors)


def _by_path(flat: Tensor, modules: tuple[ModulePlan, ...]) -> dict[str, tuple[Tensor, Tensor]]:
    """A flat gradient by module path."""
    views = factor_views(flat, modules)
    return {m.target.path: (views[m.target.index].a_RK, views[m.target.index].b_RN) for m in modules}


def _autograd(model: Any, leaves: Any, rows: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Plain autograd through ``x W^T + scale (x A^T) B^T`` in the original model; mean loss over all labels."""
    handles = []
    for path, (a_RK, b_RN, scale) in leaves.items():

        def add(_m: Any, args: Any, y: Tensor, a: Tensor = a_RK, b: Tensor = b_RN, s: float = scale) -> Tensor:
            x: Tensor = args[0]
            return y + s * (x @ a.T) @ b

        handles.append(model.get_submodule(path).register_forward_hook(add))
    ids_BT = torch.tensor([e.tokens for e in rows], device=model.device)
    logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
    loss = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), ids_BT[:, 1:].flatten())
    loss.backward()  # type: ignore[no-untyped-call]
    for handle in handles:
        handle.remove()
    return {path: (a.grad, b.grad) for path, (a, b, _) in leaves.items()}
