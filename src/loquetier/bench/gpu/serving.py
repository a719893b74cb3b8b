"""Serving: one stream, several adapters, many adapters against none."""

from __future__ import annotations

from statistics import median
from typing import Any

from loquetier.bench.gpu import work
from loquetier.bench.gpu.shapes import Shape, new_engine, random_model
from loquetier.engine.engine import Engine


def single_stream(shape: Shape) -> dict[str, Any]:
    """Milliseconds from token to token of one request; base and one adapter."""
    engine = new_engine(shape, random_model(shape))
    names = [engine.base.name, *work.load_adapters(engine, [8], "a")]
    found: dict[str, list[float]] = {"base": [], "adapter": []}
    for turn in range(shape.rounds + 1):
        for kind, name in zip(found, names, strict=True):
            (heard,) = work.submit(engine, shape, 1, [name], 2 * shape.new_tokens)
            work.run(engine, shape)
            work.check([heard], 2 * shape.new_tokens)
            per_token = (heard.times[-1] - heard.times[0]) / (len(heard.times) - 1)
            if turn:  # the first round captures and compiles
                found[kind].append(1000 * per_token)
    return {f"{kind}_ms_per_token": median(times) for kind, times in found.items()} | {"rounds": found} | graphs(engine)


def streams(shape: Shape) -> dict[str, Any]:
    """Tokens per second of the shape's streams on 4 adapters, and of twice as many on mixed ones and on none."""
    engine = new_engine(shape, random_model(shape))
    four = work.load_adapters(engine, [8] * 4, "a")
    many = 2 * shape.streams
    mixed = work.load_adapters(engine, [shape.ranks[i % len(shape.ranks)] for i in range(many)], "m")
    kinds = {
        "four_adapters": (shape.streams, four),
        "base": (shape.streams, [engine.base.name]),
        "many_mixed": (many, mixed),
        "many_base": (many, [engine.base.name]),
    }
    whole: dict[str, list[float]] = {kind: [] for kind in kinds}
    decode: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(shape.rounds + 1):
        for kind, (count, names) in kinds.items():  # one after the other in each round: A B C D A B C D
            heard = work.submit(engine, shape, count, names)
            seconds = work.run(engine, shape)
            work.check(heard, shape.new_tokens)
            if turn:
                whole[kind].append(count * shape.new_tokens / seconds)
                decode[kind].append(_decode_rate(heard))
    rates = {kind: median(values) for kind, values in whole.items()}
    return {
        "tokens_per_s": rates,
        "decode_tokens_per_s": {kind: median(values) for kind, values in decode.items()},
        "mixed_over_base": rates["many_mixed"] / rates["many_base"],
        "lora_tax": 1 - rates["four_adapters"] / rates["base"],
        "rounds": whole,
    } | graphs(engine)


def _decode_rate(heard: list[work.Heard]) -> float:
    """Tokens per second while every stream decodes."""
    first, last = max(h.times[0] for h in heard), min(h.times[-1] for h in heard)
    between = sum(first < t <= last for h in heard for t in h.times)
    return between / (last - first) if last > first else 0.0


def graphs(engine: Engine) -> dict[str, Any]:
    """What capturing took, for the report."""
    own = engine.decode_graphs
    if own is None:
        return {"graphs": None}
    return {
        "graphs": {
            "captures": own.captures,
            "seconds": own.capture_seconds,
            "bytes": own.capture_bytes,
            "refusal": own.refusal,
        }
    }
