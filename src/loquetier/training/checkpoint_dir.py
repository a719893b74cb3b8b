"""The directory of one job's checkpoints: the newest good one, the names of new ones, and which may go.

``step-000012`` is the state after optimizer step 12; ``step-000012.1`` a later one at the same step. Whatever a killed
process left half done begins with a dot and is removed by the next one; what is damaged is renamed ``damaged-...``.
"""

from __future__ import annotations

import fcntl
import logging
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loquetier.adapters.durable import fsync_directory
from loquetier.adapters.spec import LinearTarget
from loquetier.errors import CheckpointError, ConfigError
from loquetier.failpoints import FailPoint, no_fail_point
from loquetier.training.checkpoint import JobIdentity, read_checkpoint
from loquetier.training.example import Example
from loquetier.training.job import JobImage

log = logging.getLogger("loquetier.jobs")
_NAME: Final = re.compile(r"step-(\d{6,})(?:\.(\d+))?")
_LEFTOVER: Final = re.compile(r"\.{1,2}(?:step-.*)\.(?:tmp|old)-[0-9a-f]{16}")
_LOCK: Final = ".lock"


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """Where a job's checkpoints go, and how often."""

    directory: Path
    """Of this job alone; made if missing."""
    every: int = 50
    """Optimizer steps between two checkpoints; one more is made at the end."""
    keep: int = 2
    """Newest checkpoints that stay. At least 2 protect from damage to the last one."""
    resume: bool = False
    """Go on from the newest good checkpoint, if there is one. Without, the directory must hold none."""
    are_held: bool = False
    """None goes, also beyond `keep`, before `CheckpointDirectory.let_go` was told of its step."""

    def __post_init__(self) -> None:
        for name, value in (("checkpoint_every", self.every), ("checkpoints_to_keep", self.keep)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name}={value!r}: must be an integer >= 1")


@dataclass(frozen=True, slots=True)
class Resumed:
    """How a job came back."""

    path: Path
    step: int
    """Optimizer steps that were already done."""
    skipped: tuple[str, ...]
    """Newer checkpoints that were damaged, and how."""
    differences: tuple[str, ...]
    """What changed in versions, machine or threads: with any, equal bits are not promised."""


class CheckpointDirectory:
    """Owns one directory while it is open: a second job, in this process or another, is refused.

    Raises:
        ConfigError: another job uses it, or it holds checkpoints and `resume` was not asked for.
        OSError: it cannot be made or written.
    """

    def __init__(self, config: CheckpointConfig, fail_point: FailPoint = no_fail_point) -> None:
        self.config, self.path, self._fail_point = config, config.directory.absolute(), fail_point
        self._last_free: float = -1 if config.are_held else math.inf
        self.path.mkdir(parents=True, exist_ok=True)
        # The kernel drops the lock with the process, however that dies.
        self._lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._take()
        except BaseException:
            self.close()
            raise

    def _take(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"checkpoint_dir={str(self.path)!r}: another job is using it; give each job a directory of its own"
            ) from error
        for entry in self.path.iterdir():
            if _LEFTOVER.fullmatch(entry.name):
                shutil.rmtree(entry)
        if not self.config.resume and self.checkpoints():
            raise ConfigError(
                f"checkpoint_dir={str(self.path)!r} holds checkpoints ({self.checkpoints()[-1].name} is the newest); "
                "pass resume=True (--resume) to go on from there, or give another directory to begin anew"
            )

    def close(self) -> None:
        """Let others use the directory. Idempotent."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, damaged or not, oldest first."""
        return sorted((p for p in self.path.iterdir() if _NAME.fullmatch(p.name)), key=_order)

    def newest(
        self,
        targets: Sequence[LinearTarget],
        identity: JobIdentity,
        examples: tuple[Example, ...],
        eval_examples: tuple[Example, ...],
    ) -> tuple[JobImage, Resumed] | None:
        """The newest good checkpoint; None when there is none at all. Damaged ones on the way are set aside.

        Raises:
            ConfigError: it belongs to a job with other settings, data or base.
            CheckpointError: there are checkpoints, and all of them are damaged. Nothing was changed.
        """
        damaged: list[tuple[Path, str]] = []
        for path in reversed(self.checkpoints()):
            try:
                image, different = read_checkpoint(path, targets, identity, examples, eval_examples)
            except CheckpointError as error:
                damaged.append((path, str(error)))
                continue
            self._set_aside(damaged)
            for difference in different:
                log.warning("job %s resumes, but not bit for bit: %s", identity.name, difference)
            skipped = tuple(reason for _, reason in damaged)
            return image, Resumed(path, len(image.history), skipped, tuple(different))
        if damaged:
            raise CheckpointError(
                f"checkpoint_dir={str(self.path)!r}: no good checkpoint is left: "
                f"{'; '.join(reason for _, reason in damaged)}. Give another directory to begin anew."
            )
        return None

    def _set_aside(self, damaged: Sequence[tuple[Path, str]]) -> None:
        """Renamed, not removed: somebody may want to look, and pruning must count good ones only."""
        for path, reason in damaged:
            log.warning("a damaged checkpoint is set aside and the one before it used: %s", reason)
            os.rename(path, path.with_name(f"damaged-{path.name}-{secrets.token_hex(4)}"))
        if damaged:
            fsync_directory(self.path)

    def at_step(self, step: int) -> Path | None:
        """The newest checkpoint of this step; all of a step hold the same weights."""
        return next((path for path in reversed(self.checkpoints()) if _order(path)[0] == step), None)

    def let_go(self, step: int) -> None:
        """Nobody waits for the checkpoints up to this step any more: `add` may remove them. Any thread."""
        self._last_free = max(self._last_free, step)

    def add(self, step: int, write: Callable[[Path], None], best_step: int | None = None) -> Path:
        """Have `write` make the next checkpoint, then remove those beyond `keep`, but not that of `best_step`.

        Those that are held stay too.

        Errors are those of `write`.
        """
        taken = [_order(path) for path in self.checkpoints()]
        again = max((number for at, number in taken if at == step), default=-1) + 1
        path = self.path / (f"step-{step:06d}" + (f".{again}" if again else ""))
        write(path)
        self._fail_point("checkpoint.before_prune")
        best = None if best_step is None else self.at_step(best_step)
        for old in self.checkpoints()[: -self.config.keep]:
            if old == best or _order(old)[0] > self._last_free:
                continue
            # First out of sight, so that a kill in the middle leaves no half of a checkpoint under a good name.
            gone = old.with_name(f".{old.name}.old-{secrets.token_hex(8)}")
            os.rename(old, gone)
            self._fail_point("checkpoint.in_prune")
            shutil.rmtree(gone)
        return path


def _order(path: Path) -> tuple[int, int]:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1]), int(match[2] or 0)
