"""What a job leaves: its checkpoints as models, its last weights as the fine-tuned model, its table as a file."""

from __future__ import annotations

import hashlib
import os
import secrets
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from loquetier.adapters.durable import fsync_directory
from loquetier.adapters.peft_config import adapter_digest
from loquetier.adapters.peft_write import CONFIG_NAME, WEIGHTS_NAME
from loquetier.adapters.spec import AdapterSpec
from loquetier.server.jobs.patience import Patience
from loquetier.server.jobs.shape import checkpoint_metrics
from loquetier.server.jobs.shelf import Shelf
from loquetier.server.store.adapters import VersionRow
from loquetier.server.store.files import FileRow
from loquetier.server.store.jobs import CheckpointRow, JobRow
from loquetier.server.store.store import Store
from loquetier.storage import with_room
from loquetier.training.job import StepRecord

log = structlog.get_logger("loquetier.server.jobs")

CHECKPOINTS_KEPT: Final = 3
"""Newest checkpoints of a job that stay as models, as OpenAI keeps those of three epochs."""
RESULTS_NAME: Final = "step_metrics.csv"


@dataclass(frozen=True, slots=True)
class Keeper:
    """Turns files of a job's directory into rows. On the job's own thread; waits while the disk is full."""

    store: Store
    patience: Patience
    shelf: Shelf

    def keep_checkpoint(
        self, job: JobRow, path: Path, record: StepRecord, spec: AdapterSpec, number: int | None, *, live: bool
    ) -> None:
        """Have a checkpoint answer as ``MODEL:ckpt-step-N``, and with `live` as MODEL after a restart.

        Args:
            number: of the version that served these weights, if one did.
        """
        model = f"{job.model}:ckpt-step-{record.step}"
        adapters = self.store.adapters
        if adapters.find(model) is not None:
            return  # this step was kept before a restart
        # Linked, not copied: the engine never writes a checkpoint's files again, only removes them.
        place = self.patience.run(
            lambda: with_room(adapters.data_dir.adapters, lambda: adapters.place(path, link=True))
        )
        weights = place / WEIGHTS_NAME
        with weights.open("rb") as file:
            digest = adapter_digest(hashlib.file_digest(file, "sha256").digest(), spec)
        size, now = weights.stat().st_size + (place / CONFIG_NAME).stat().st_size, int(self.store.wall())

        def change(c: sqlite3.Connection) -> tuple[list[str], list[str]]:
            if adapters.find(job.model) is None:
                return [], [place.name]  # the model was deleted meanwhile
            row = CheckpointRow(
                id=f"ftckpt_{secrets.token_hex(12)}", job_id=job.id, step=record.step, created_at=now, model=model,
                metrics=checkpoint_metrics(record),
            )  # fmt: skip
            self.store.jobs.add_checkpoint(c, row)
            adapters.create(c, model, job.owner, "checkpoint", job.model, job.id)
            adapters.add(c, VersionRow(model, 1, digest, place.name, size, now, record.step))
            own = adapters.reserve(c, job.model, 1) if number is None else number
            adapters.add(c, VersionRow(job.model, own, digest, place.name, size, now, record.step), live=live)
            return self._drop_old(c, job)

        dropped, directories = self.patience.write(change)
        self.shelf.serve(model)
        self.shelf.withdraw(dropped, directories)

    def _drop_old(self, c: sqlite3.Connection, job: JobRow) -> tuple[list[str], list[str]]:
        """Forget checkpoints beyond the newest, but not the one that the job's model is.

        Returns:
            Their names and their directories.
        """
        rows = c.execute("SELECT model, step FROM checkpoints WHERE job_id = ? ORDER BY seq DESC", (job.id,)).fetchall()
        live = c.execute(
            "SELECT step FROM versions JOIN adapters USING (name) WHERE name = ? AND number = live_number", (job.model,)
        ).fetchone()
        gone: list[str] = []
        names: list[str] = []
        for row in rows[CHECKPOINTS_KEPT:]:
            if live is not None and row["step"] == live["step"]:
                continue
            found = c.execute("SELECT directory FROM versions WHERE name = ?", (row["model"],)).fetchall()
            gone += [version["directory"] for version in found]
            names.append(row["model"])
            self.store.jobs.drop_checkpoint(c, row["model"])
            self.store.adapters.remove(c, row["model"])
            c.execute("DELETE FROM versions WHERE name = ? AND step = ?", (job.model, row["step"]))
        return names, gone

    def place_results(self, job: JobRow, table: Path) -> FileRow:
        """A job's table among the files; its row is for the caller to commit."""
        content = table.read_bytes()
        file = FileRow(
            id=f"file-{secrets.token_hex(12)}", owner=job.owner, key_id=job.key_id, filename=RESULTS_NAME,
            purpose="fine-tune-results", bytes=len(content), sha256=hashlib.sha256(content).hexdigest(),
            created_at=int(self.store.wall()), expires_at=None, status="processed",
        )  # fmt: skip
        final = self.store.files.path(file.id)

        def write() -> None:
            temporary = self.store.data_dir.temporary / f"results.tmp-{file.id}"
            temporary.unlink(missing_ok=True)
            with temporary.open("xb") as target:
                target.write(content)
                target.flush()
                os.fsync(target.fileno())
            os.rename(temporary, final)
            fsync_directory(final.parent)

        self.patience.run(lambda: with_room(final.parent, write))
        return file
