"""Round after round, kept after every measurement, so that a broken run can go on where it stopped."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loquetier.bench import roofline
from loquetier.bench.peers.envs import PeerEnvironments
from loquetier.bench.peers.plan import Plan, left
from loquetier.bench.peers.session import Session
from loquetier.bench.rows import ROWS
from loquetier.bench.run import commit, machine, save
from loquetier.bench.summary import summarize
from loquetier.errors import ConfigError

Tell = Callable[[str, int, int], None]
"""Told what is measured next, how many measurements are done, and how many there will be."""

HOW = (
    "Every figure is the median of its rounds; a ratio is taken within each round. Rates count generated tokens from "
    "the submission of all requests to the last token, prompts' prefill included; prefill counts the prompt's. HTTP: "
    "the openai SDK streams from `loquetier serve` and from vLLM's own server, on the same cores as the server. In "
    "process: our engine and PEFT's generate with adapter_names, token ids in and out, no server. Adapters are held in "
    "the base's type by both servers, in float32 in process by both. Sides that wait are stopped. Prompts are random "
    "token ids, new in every round; greedy, no answer ends early."
)


def measure(
    plan: Plan,
    *,
    rounds: int,
    output: Path,
    envs: PeerEnvironments | None,
    resume: bool,
    tell: Tell,
) -> dict[str, Any]:
    """Measure until `output` holds `rounds` rounds; returns what it holds then.

    Args:
        resume: keep the rounds that `output` has, if they are of the same plan.

    Raises:
        ConfigError: what is there was measured otherwise, or an environment is missing. EngineError: a side failed.
    """
    begun = _started(plan, output) if resume else None
    result = begun or {"plan": plan.as_json(), "samples": []}
    samples: list[dict[str, Any]] = result["samples"]
    todo = [(number, *step) for number in range(1, rounds + 1) for step in left(plan.steps, samples, number)]
    done, total = rounds * len(plan.steps) - len(todo), rounds * len(plan.steps)
    if not todo:
        return result
    # Logs go with the directory: the end of a failed side's is in its error.
    with tempfile.TemporaryDirectory() as directory, Session(plan, Path(directory), envs) as session:
        result |= _about(plan, session)
        for number, draw, side, task in todo:
            tell(f"round {number}/{rounds}: {side} {task}", done, total)
            # The load tells whether anything else ran meanwhile.
            samples.append(
                {"round": number, "side": side, "task": task, **session.run(side, task, draw), "load": _load()}
            )
            result["versions"] = session.versions or result.get("versions", {})
            done += 1
            save(finished(result, plan), output)
    tell("done", done, total)
    return finished(result, plan)


def _started(plan: Plan, output: Path) -> dict[str, Any] | None:
    if not output.is_file():
        return None
    found: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    same = json.loads(json.dumps(plan.as_json()))  # tuples are lists there
    if found.get("plan") != same or found.get("commit") != commit():
        raise ConfigError(
            f"{output} was measured with another plan or commit; name another output, or start again without --resume"
        )
    return found


def _about(plan: Plan, session: Session) -> dict[str, Any]:
    return {
        "how": HOW,
        "machine": machine() | {"threads": plan.threads},
        "commit": commit(),
        "time": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "dtype": session.dtype,
        "size": asdict(session.size),
    }


def finished(result: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """The result with its rows, from its samples."""
    rates = [s for s in result["samples"] if s["task"] == "roofline"]
    best = {}
    if rates:
        typical = {key: sorted(s[key] for s in rates)[len(rates) // 2] for key in ("bytes_per_s", "flops_per_s")}
        best = roofline.bounds(roofline.ModelSize(**result["size"]), plan.traffic, typical, labelled=0.5)
        result["roofline"] = typical
    numbers = {s["round"] for s in result["samples"]}
    return result | {"rounds": len(numbers), "rows": summarize(ROWS, result["samples"], best)}


def _load() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
