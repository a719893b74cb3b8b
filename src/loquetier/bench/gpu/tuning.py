"""Fine-tuning: against PEFT, two jobs at once, and beside serving."""

from __future__ import annotations

import gc
import time
from statistics import median
from typing import Any

import torch

from loquetier.bench.gpu import roofline, work
from loquetier.bench.gpu.shapes import Shape, new_engine, random_model, wait
from loquetier.engine.engine import Engine
from loquetier.errors import ConfigError


def against_peft(shape: Shape) -> dict[str, Any]:
    """Tokens per second of one job and of the same loop with PEFT, on examples of one length: nobody pads.

    The share of the GEMM rate counts 4 operations per weight and token: forward and the gradient of the inputs.
    """
    gemm = roofline.measure(shape)["gemm_flop_per_s"]
    tokens = shape.train_batch * (shape.train_tokens - 1)
    ours = tokens / _ours(shape)
    _free()
    theirs = tokens / _peft(shape)
    return {
        "ours_tokens_per_s": ours,
        "peft_tokens_per_s": theirs,
        "over_peft": ours / theirs,
        "share_of_gemm_rate": ours * 4 * shape.linear_weights / gemm,
        "tokens_per_step": tokens,
    }


def _ours(shape: Shape) -> float:
    """Seconds per optimizer step."""
    engine = new_engine(shape, random_model(shape))
    steps = shape.train_steps + 2
    records = work.start_job(engine, "job", work.examples(shape, shape.train_batch), shape.train_batch, steps)
    work.run(engine, shape)
    return median(r.seconds for r in records[2:])


def _peft(shape: Shape) -> float:
    """Seconds per optimizer step of a plain loop: one batch, fused AdamW."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConfigError("the comparison needs peft: pip install peft") from error
    wanted = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    model: Any = get_peft_model(random_model(shape), wanted)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    rows = [e.tokens for e in work.examples(shape, shape.train_batch)]
    ids_BT = torch.tensor(rows, device=shape.device)
    times = []
    for _ in range(shape.train_steps + 2):
        wait(shape)
        started = time.perf_counter()
        model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait(shape)
        times.append(time.perf_counter() - started)
    return median(times[2:])


def two_jobs(shape: Shape) -> dict[str, Any]:
    """Two jobs of small batches at once against one after the other."""
    engine = new_engine(shape, random_model(shape))
    together, apart = [], []
    for turn in range(shape.rounds + 1):
        times = (_jobs(engine, shape, at_once=True), _jobs(engine, shape, at_once=False))
        if turn:
            together.append(times[0])
            apart.append(times[1])
    return {
        "together_s": median(together),
        "one_after_the_other_s": median(apart),
        "speedup": median(apart) / median(together),
        "examples_per_step": _SMALL_BATCH,
        "tokens_per_example": _short(shape) - 1,
    }


_SMALL_BATCH = 2


def _short(shape: Shape) -> int:
    return shape.train_tokens // 4 + 1


def _jobs(engine: Engine, shape: Shape, *, at_once: bool) -> float:
    seconds = 0.0
    for number in range(2):
        rows = work.examples(shape, 2 * _SMALL_BATCH, seed=number, tokens=_short(shape))
        work.start_job(engine, f"job{number}", rows, _SMALL_BATCH, shape.train_steps)
        if not at_once:
            seconds += work.run(engine, shape)
    if at_once:
        seconds = work.run(engine, shape)
    for number in range(2):
        engine.adapters.unload(f"job{number}")
    return seconds


def mixed(shape: Shape) -> dict[str, Any]:
    """Serving the shape's streams, training, and both in the same steps."""
    engine = new_engine(shape, random_model(shape))
    names = work.load_adapters(engine, [8] * 4, "a")
    found: dict[str, list[float]] = {"serve_s": [], "train_s": [], "both_s": []}
    for turn in range(shape.rounds + 1):
        for kind, times in found.items():
            heard = work.submit(engine, shape, shape.streams, names) if kind != "train_s" else []
            if kind != "serve_s":
                work.start_job(engine, "job", work.examples(shape, 4), 4, 2)
            seconds = work.run(engine, shape)
            work.check(heard, shape.new_tokens)
            if kind != "serve_s":
                engine.adapters.unload("job")
            if turn:
                times.append(seconds)
    values = {kind: median(times) for kind, times in found.items()}
    return values | {"both_over_one_after_the_other": values["both_s"] / (values["serve_s"] + values["train_s"])}


def _free() -> None:
    """Give the device's memory back: an engine is a circle of references."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
