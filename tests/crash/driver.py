"""Trains one tiny job over and over, killing it, and prints as JSON what came out. Run as a script; POSIX only.

The parent imports torch once, before any thread, and forks a child per life of the job: starting costs a fraction of
a second instead of an import of torch. Nothing of torch runs in the parent.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

# Everything that a child needs is imported here, once.
import loquetier.checkpointing  # noqa: F401
from loquetier import EngineConfig, LoraSpec, Runtime, TrainingConfig
from loquetier.failpoints import POINTS, VARIABLE

STEPS, EVERY = 30, 3
ON_RESUME = ("files.before_replace",)
"""Fail points that only a life after the first passes."""
CONFIG = EngineConfig(dtype="float32", kv_memory=1 << 20, adapter_memory=1 << 20, max_train_rows=24)
"""Few rows: an optimizer step takes several tapes, so that kills fall between them."""
SPEC = LoraSpec(r=4, alpha=8)
TRAINING = TrainingConfig(
    batch_size=3,
    gradient_accumulation_steps=2,
    max_steps=STEPS,
    learning_rate=1e-2,
    lr_scheduler_type="cosine",
    warmup_ratio=0.1,
    weight_decay=0.01,
    seed=5,
    eval_every=7,
    publish="every_n_steps",
    publish_every=4,
)
DATA = [{"prompt": f"{a} then ", "completion": f"{b}{a}!"} for a, b in zip("abcdefghijk", "kjihgfedcba", strict=True)]


def live(base: Path, work: Path) -> None:
    """One life of the job: from its newest checkpoint to its end."""
    with Runtime(str(base), config=CONFIG) as runtime:
        handle = runtime.finetune(
            "fox",
            DATA,
            lora=SPEC,
            training=TRAINING,
            eval_data=DATA[:3],
            checkpoint_dir=work / "checkpoints",
            checkpoint_every=EVERY,
            output_dir=work / "files",
            resume=True,
        )
        handle.wait()
        for error in (*handle.checkpoint_errors, *handle.file_errors):
            raise error
        runtime.check_integrity()
        runtime.export_adapter("fox", work / "out", overwrite=True)


def spawn(base: Path, work: Path, fail_point: str | None = None) -> int:
    """Fork a child that lives the job; it exits with 0 at the end, 1 on any error."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        if fail_point is not None:
            os.environ[VARIABLE] = fail_point
        live(base, work)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait(pid: int) -> int:
    """The child's exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def finish(base: Path, work: Path, code: int) -> None:
    """Restart until the job is done; only a kill is a reason to."""
    while code == -signal.SIGKILL:
        code = wait(spawn(base, work))
    if code != 0:
        raise SystemExit(f"the job in {work.name} failed with exit code {code}")


def outcome(work: Path) -> dict[str, Any]:
    """What a finished job left behind."""
    checkpoints = work / "checkpoints"
    newest = max(p for p in checkpoints.iterdir() if p.name.startswith("step-"))
    state = json.loads((newest / "trainer_state.json").read_text())["state"]["job"]
    return {
        "sha256": {
            name: hashlib.sha256((work / "out" / name).read_bytes()).hexdigest()
            for name in ("adapter_model.safetensors", "adapter_config.json")
        },
        "moments": hashlib.sha256((newest / "optimizer.safetensors").read_bytes()).hexdigest(),
        "history": [{k: v for k, v in record.items() if k != "seconds"} for record in state["history"]],
        "results": (work / "files" / "results.csv").read_text(),
        "metrics": metrics_of(work / "files" / "metrics.jsonl"),
        "files": sorted(p.name for p in (work / "files").iterdir()),
        "leftovers": sorted(p.name for p in checkpoints.iterdir() if not p.name.startswith("step-")),
    }


def metrics_of(path: Path) -> list[list[Any]]:
    """What the metrics say of the steps: kind, step, loss."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        [x["event"], x["step"], x.get("loss", x.get("valid_loss"))]
        for x in lines
        if x["event"] in ("step", "evaluation")
    ]


def killed_at_random(base: Path, work: Path, seconds: float, rng: random.Random) -> int:
    """One job, killed at a random instant of each life until one of them gets through; returns the kills."""
    kills = 0
    while True:
        pid = spawn(base, work)
        # Not synchronisation: the instant is meant to be arbitrary.
        time.sleep(rng.uniform(0.0, 1.1 * seconds))
        os.kill(pid, signal.SIGKILL)
        code = wait(pid)
        if code == -signal.SIGKILL:
            kills += 1
            if kills % 4 == 0:  # so that a long series of early kills ends
                finish(base, work, code)
                return kills
            continue
        finish(base, work, code)
        return kills


def fail_points_to_visit(num_kills: int, rng: random.Random) -> list[str]:
    """Every fail point at its first pass and, with kills to spare, at a later one."""
    later = [f"{p}:{rng.randint(2, 4)}" for p in POINTS if p not in ("job.before_end", *ON_RESUME)]  # passed once
    return [*POINTS, *(later if num_kills >= 4 * len(POINTS) else [])]


def main() -> None:
    """Run `--kills` kills and print the report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("base", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    reference = options.work / "unbroken"
    finish(options.base, reference, wait(spawn(options.base, reference)))  # also warms the file cache
    again, started = options.work / "timed", time.monotonic()
    finish(options.base, again, wait(spawn(options.base, again)))
    seconds = time.monotonic() - started
    report: dict[str, Any] = {"unbroken": outcome(reference), "seconds": seconds, "runs": []}
    left = options.kills
    for number, point in enumerate(itertools.chain(fail_points_to_visit(options.kills, rng), itertools.repeat(None))):
        if left <= 0:
            break
        work = options.work / f"run-{number}"
        if point is None:
            kills = killed_at_random(options.base, work, seconds, rng)
        else:
            kills = 0
            if point in ON_RESUME:
                kills += wait(spawn(options.base, work, "job.after_step:10")) == -signal.SIGKILL
            code = wait(spawn(options.base, work, point))
            kills += code == -signal.SIGKILL
            finish(options.base, work, code)
        left -= kills
        report["runs"].append({"point": point, "kills": kills} | outcome(work))
        shutil.rmtree(work)
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
