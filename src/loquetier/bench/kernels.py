"""Each C kernel against the plain-torch reference on shapes of smollm2-135m, with a roofline beside.

``python -m loquetier.bench.kernels [--output FILE]``. The roofline is the bytes that the kernel must move over the
machine's measured read bandwidth; what fits the caches can be faster than it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loquetier.kernels import attention, decode, reference, smlm
from loquetier.kernels.attention import MaskRule
from loquetier.kernels.reference import Factors, FactorTable, Segment
from loquetier.kernels.select import process_kernels
from loquetier.kernels.smlm import SmlmPlan

HIDDEN, INNER = 576, 1536


class Case(NamedTuple):
    """One kernel on one shape, both ways."""

    name: str
    reference: Callable[[], object]
    ours: Callable[[], object]
    num_bytes: int


def seconds(function: Callable[[], object], budget: float = 0.25) -> float:
    """Median time of one call, from at least 5 calls and some `budget` seconds."""
    function()
    times: list[float] = []
    until = time.perf_counter() + budget
    while len(times) < 5 or time.perf_counter() < until:
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def read_bandwidth() -> float:
    """Bytes per second of reading memory once, on torch's threads."""
    values = torch.ones(1 << 28)  # 1 GiB: beyond any cache
    return values.numel() * 4 / seconds(values.sum, 1.0)


def smlm_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Decode (one row per segment), a prefill and training rows."""
    shapes = {
        "decode 16 rows, 4 adapters r=8": ([4] * 4, [8] * 4),
        "decode 16 rows, 16 adapters r=4..64": ([1] * 16, [4, 8, 16, 64] * 4),
        "decode 1 row, r=16": ([1], [16]),
        "prefill 4 x 100 rows, r=8": ([100] * 4, [8] * 4),
        "train 800 rows, r=8": ([800], [8]),
        "train 800 rows, r=64": ([800], [64]),
    }
    for shape, (lengths, ranks) in shapes.items():
        for width_in, width_out in ((HIDDEN, INNER), (INNER, HIDDEN)):
            segments, table, grads = _layout(lengths, ranks, width_in, width_out)
            x_TK = torch.randn(sum(lengths), width_in).to(dtype)
            y_TN = torch.randn(sum(lengths), width_out).to(dtype)
            weights = sum(ranks) * (width_in + width_out) * 4
            traffic = x_TK.nbytes + 2 * y_TN.nbytes + weights
            arguments, plan = (x_TK, y_TN, 0, segments, table), SmlmPlan()
            yield Case(
                f"smlm_forward {shape}, {width_in}->{width_out}",
                partial(reference.smlm_forward, *arguments),
                partial(smlm.smlm_forward, *arguments, plan),
                traffic,
            )
            if shape.startswith("train"):
                back = (x_TK, y_TN, torch.zeros_like(x_TK), 0, segments, table, grads)
                yield Case(
                    f"smlm_backward {shape}, {width_in}->{width_out}",
                    partial(reference.smlm_backward, *back),
                    partial(smlm.smlm_backward, *back),
                    3 * x_TK.nbytes + y_TN.nbytes + 3 * weights,
                )


def _layout(
    lengths: Sequence[int], ranks: Sequence[int], width_in: int, width_out: int
) -> tuple[tuple[Segment, ...], FactorTable, FactorTable]:
    segments: list[Segment] = []
    for slot, length in enumerate(lengths):
        start = segments[-1].stop if segments else 0
        segments.append(Segment(slot, start, start + length))

    def factors(fill: Callable[..., Tensor]) -> dict[int, dict[int, Factors]]:
        return {s: {0: Factors(fill(r, width_in) * 0.02, fill(r, width_out) * 0.02, 2.0)} for s, r in enumerate(ranks)}

    return tuple(segments), factors(torch.randn), factors(torch.zeros)


def decode_cases(dtype: torch.dtype) -> Iterator[Case]:
    """9 query heads on 3 kv heads of 64, pages of 16 tokens."""
    heads, kv_heads, dim, page = 9, 3, 64, 16
    for count, length in ((16, 160), (16, 1000), (1, 160), (1, 4000)):
        width = -(-length // page)
        k, v = (torch.randn(count * width + 1, page, kv_heads, dim).to(dtype) for _ in range(2))
        pages_NB = torch.randperm(count * width).view(count, width) + 1
        positions_N = torch.full((count,), length - 1)
        visible_NP = (torch.arange(width * page) < length).expand(count, -1)
        q_NHD = torch.randn(count, heads, dim).to(dtype)
        yield Case(
            f"decode_attention {count} sequences of {length} tokens",
            partial(attention.decode_attention, q_NHD, k, v, pages_NB, visible_NP, 0.125, None),
            partial(
                decode.decode_attention,
                q_NHD,
                k,
                v,
                pages_NB,
                positions_N,
                _always(visible_NP),
                0.125,
                MaskRule(),
            ),
            count * length * kv_heads * dim * dtype.itemsize * 2,
        )


def _always(mask: Tensor) -> Callable[[int | None], Tensor]:
    return lambda window: mask


def measure(dtype: torch.dtype, only: str) -> dict[str, Any]:
    """All cases with `only` in their name, as data."""
    bandwidth = read_bandwidth()
    rows = []
    for case in (*smlm_cases(dtype), *decode_cases(dtype)):
        if only not in case.name:
            continue
        plain, ours = seconds(case.reference), seconds(case.ours)
        row = {
            "kernel": case.name,
            "reference_us": plain * 1e6,
            "c_us": ours * 1e6,
            "ratio": plain / ours,
            "roofline_us": case.num_bytes / bandwidth * 1e6,
        }
        print(
            f"{case.name:66} {row['reference_us']:9.1f} {row['c_us']:9.1f} us {row['ratio']:6.2f}x "
            f"(bytes / bandwidth {row['roofline_us']:7.1f} us)"
        )
        rows.append(row)
    return {
        "dtype": str(dtype),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "kernels": {name: choice.reason for name, choice in process_kernels().choices.items()},
        "read_bandwidth": bandwidth,
        "rows": rows,
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--only", default="", help="part of the names of the cases to run")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    result = measure(getattr(torch, args.dtype), args.only)
    print(f"read bandwidth {result['read_bandwidth'] / 1e9:.1f} GB/s, {result['threads']} threads")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
