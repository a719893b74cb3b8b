"""The sections in order, what each may take, and what of their numbers has a target."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from loquetier.bench.gpu import numerics, roofline, serving, tuning
from loquetier.bench.gpu.shapes import Shape


@dataclass(frozen=True, slots=True)
class Section:
    """One process: a crash, a hang or a lack of memory ends it alone."""

    name: str
    run: Callable[[Shape], dict[str, Any]]
    seconds: float
    """After which it is ended."""


SECTIONS: tuple[Section, ...] = (
    Section("kernels", numerics.kernels, 70),
    Section("engine", numerics.engine, 70),
    Section("roofline", roofline.measure, 30),
    Section("single_stream", serving.single_stream, 70),
    Section("streams", serving.streams, 110),
    Section("fine_tuning", tuning.against_peft, 80),
    Section("two_jobs", tuning.two_jobs, 50),
    Section("mixed", tuning.mixed, 50),
)
"""Numerics first: a number of something wrong is worth nothing. Together below nine minutes and a half."""


@dataclass(frozen=True, slots=True)
class Target:
    """A goal of the GPU benchmark."""

    measure: str
    section: str
    path: tuple[str, ...]
    """To the value in the section's result."""
    goal: float
    at_most: bool = False

    def judged(self, results: Mapping[str, Any]) -> dict[str, Any]:
        """The measured value and whether it meets the goal; None for what was not measured."""
        value: Any = results.get(self.section, {}).get("result")
        for key in self.path:
            value = value.get(key) if isinstance(value, dict) else None
        met = None if value is None else (value <= self.goal if self.at_most else value >= self.goal)
        return {"measure": self.measure, "goal": self.goal, "at_most": self.at_most, "value": value, "met": met}


TARGETS: tuple[Target, ...] = (
    Target("single stream, base, ms/token", "single_stream", ("base_ms_per_token",), 8.0, at_most=True),
    Target("single stream, one adapter, ms/token", "single_stream", ("adapter_ms_per_token",), 8.0, at_most=True),
    Target("16 streams, 4 adapters, tokens/s", "streams", ("tokens_per_s", "four_adapters"), 1500.0),
    Target("32 mixed adapters over base", "streams", ("mixed_over_base",), 0.75),
    Target("fine-tuning over PEFT, unpadded", "fine_tuning", ("over_peft",), 1.0),
    Target("fine-tuning, share of the GEMM rate", "fine_tuning", ("share_of_gemm_rate",), 0.30),
    Target("two jobs at once over one after the other", "two_jobs", ("speedup",), 1.3),
)
"""What an H200-class GPU is aimed at."""
