"""Fine-tuning jobs, their events and their checkpoints, as rows."""

from __future__ import annotations

import json
import secrets
import sqlite3
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from loquetier.server.store.database import Database

JobState = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
FINAL: Final = frozenset({"succeeded", "failed", "cancelled"})
_JSON: Final = frozenset({"settings", "metadata", "error", "result_files"})


@dataclass(frozen=True, kw_only=True, slots=True)
class JobRow:
    """One job."""

    seq: int = 0
    """Order of creation; given by the table."""
    id: str
    owner: str
    key_id: str
    created_at: int
    finished_at: int | None = None
    status: JobState = "validating_files"
    wants_pause: bool = False
    """Its owner has paused it: it does not go on by itself after a restart."""
    reason: str | None = None
    """Why it is in its state, where that does not say it."""
    base: str
    model: str
    """The adapter that it trains, and the name under which that answers."""
    is_published: bool = False
    """Whether it has answered under that name."""
    training_file: str
    validation_file: str | None
    seed: int
    settings: dict[str, Any]
    """`JobSettings` as JSON."""
    metadata: dict[str, str] | None = None
    error: dict[str, Any] | None = None
    fine_tuned_model: str | None = None
    result_files: list[str] = field(default_factory=list)
    trained_tokens: int | None = None

    @property
    def is_final(self) -> bool:
        """It will never run again."""
        return self.status in FINAL


@dataclass(frozen=True, kw_only=True, slots=True)
class EventRow:
    """One thing that happened to a job."""

    seq: int = 0
    id: str = ""
    job_id: str
    once: str | None = None
    """What makes it the same event when a resumed job comes past it again; None = each one counts."""
    created_at: int = 0
    level: Literal["info", "warn", "error"] = "info"
    type: Literal["message", "metrics"] = "message"
    message: str
    data: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointRow:
    """A checkpoint that answers as a model of its own."""

    seq: int = 0
    id: str
    job_id: str
    step: int
    created_at: int
    model: str
    metrics: dict[str, Any]


@dataclass(frozen=True, slots=True)
class JobTable:
    """Reads are what is committed; writes happen in the transaction whose connection they are given."""

    database: Database
    wall: Callable[[], float]

    def find(self, job_id: str, owner: str | None = None) -> JobRow | None:
        """One job; with `owner`, only if it is his."""
        row = self.database.row("SELECT * FROM jobs WHERE id = ? AND owner = ifnull(?, owner)", (job_id, owner))
        return None if row is None else _job(row)

    def open(self) -> list[JobRow]:
        """Jobs that have not ended, oldest first."""
        return [_job(row) for row in self.database.rows(f"SELECT * FROM jobs WHERE {_OPEN} ORDER BY seq")]

    def num_open(self, c: sqlite3.Connection, owner: str | None = None) -> int:
        """How many have not ended, of one owner or of all."""
        row = c.execute(f"SELECT count(*) FROM jobs WHERE {_OPEN} AND owner = ifnull(?, owner)", (owner,)).fetchone()
        return int(row[0])

    def page(
        self, owner: str, *, after: int | None, limit: int, metadata: Mapping[str, str] | None, no_metadata: bool
    ) -> list[JobRow]:
        """Jobs of an owner, newest first, from behind the one whose `seq` is `after`.

        Args:
            metadata: only jobs that have all of these pairs.
            no_metadata: only jobs without any.
        """
        where, values = "", list[Any]()
        for key, value in (metadata or {}).items():
            where += " AND EXISTS (SELECT 1 FROM json_each(jobs.metadata) AS m WHERE m.key = ? AND m.value = ?)"
            values += [key, value]
        if no_metadata:
            where += " AND metadata IS NULL"
        rows = self.database.rows(
            f"SELECT * FROM jobs WHERE owner = ? AND ifnull(seq < ?, 1){where} ORDER BY seq DESC LIMIT ?",
            (owner, after, *values, limit),
        )
        return [_job(row) for row in rows]

    def add(self, c: sqlite3.Connection, job: JobRow) -> None:
        """A new job. Raises sqlite3.IntegrityError for an id or model that is taken."""
        c.execute(
            "INSERT INTO jobs (id, owner, key_id, created_at, status, base, model, training_file, validation_file, "
            "seed, settings, metadata) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (job.id, job.owner, job.key_id, job.created_at, job.status, job.base, job.model, job.training_file,
             job.validation_file, job.seed, _text(job.settings), _text(job.metadata)),
        )  # fmt: skip

    def update(self, c: sqlite3.Connection, job_id: str, **fields: Any) -> bool:
        """Change fields of a job that has not ended; False when it has."""
        assignments = ", ".join(f"{name} = ?" for name in fields)
        values = [_text(value) if name in _JSON else value for name, value in fields.items()]
        done = c.execute(f"UPDATE jobs SET {assignments} WHERE id = ? AND {_OPEN}", (*values, job_id))
        return done.rowcount == 1

    def complete(self, c: sqlite3.Connection, job_id: str, **fields: Any) -> None:
        """Change fields of a job that has ended."""
        assignments = ", ".join(f"{name} = ?" for name in fields)
        values = [_text(value) if name in _JSON else value for name, value in fields.items()]
        c.execute(f"UPDATE jobs SET {assignments} WHERE id = ?", (*values, job_id))

    def status_in(self, c: sqlite3.Connection, job_id: str) -> JobState:
        """The status as the transaction sees it."""
        state: JobState = c.execute("SELECT status FROM jobs WHERE id = ?", (job_id,)).fetchone()[0]
        return state

    def tell(self, c: sqlite3.Connection, event: EventRow) -> bool:
        """Add an event; False when it was told before."""
        cursor = c.execute(
            "INSERT INTO events (id, job_id, once, created_at, level, type, message, data) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (job_id, once) DO NOTHING",
            (f"ftevent-{secrets.token_hex(12)}", event.job_id, event.once, int(self.wall()), event.level, event.type,
             event.message, _text(event.data)),
        )  # fmt: skip
        return cursor.rowcount == 1

    def events(self, job_id: str, *, after: int | None, limit: int, descending: bool = True) -> list[EventRow]:
        """Events of a job from behind the one whose `seq` is `after`."""
        order, compare = ("DESC", "<") if descending else ("ASC", ">")
        rows = self.database.rows(
            f"SELECT * FROM events WHERE job_id = ? AND ifnull(seq {compare} ?, 1) ORDER BY seq {order} LIMIT ?",
            (job_id, after, limit),
        )
        return [EventRow(**{**dict(row), "data": _value(row["data"])}) for row in rows]

    def event_seq(self, job_id: str, event_id: str) -> int | None:
        """Where an event of a job stands; None when there is no such event."""
        row = self.database.row("SELECT seq FROM events WHERE job_id = ? AND id = ?", (job_id, event_id))
        return None if row is None else int(row[0])

    def has_told(self, job_id: str, once: str) -> bool:
        """Whether an event is there."""
        return self.database.row("SELECT 1 FROM events WHERE job_id = ? AND once = ?", (job_id, once)) is not None

    def add_checkpoint(self, c: sqlite3.Connection, checkpoint: CheckpointRow) -> bool:
        """A checkpoint; False when the job has one of this step."""
        cursor = c.execute(
            "INSERT INTO checkpoints (id, job_id, step, created_at, model, metrics) VALUES (?, ?, ?, ?, ?, ?) "
            "ON CONFLICT (job_id, step) DO NOTHING",
            (checkpoint.id, checkpoint.job_id, checkpoint.step, checkpoint.created_at, checkpoint.model,
             _text(checkpoint.metrics)),
        )  # fmt: skip
        return cursor.rowcount == 1

    def checkpoints(self, job_id: str, *, after: int | None = None, limit: int = 1 << 30) -> list[CheckpointRow]:
        """Newest first, from behind the one whose `seq` is `after`."""
        rows = self.database.rows(
            "SELECT * FROM checkpoints WHERE job_id = ? AND ifnull(seq < ?, 1) ORDER BY seq DESC LIMIT ?",
            (job_id, after, limit),
        )
        return [CheckpointRow(**{**dict(row), "metrics": _value(row["metrics"])}) for row in rows]

    def drop_checkpoint(self, c: sqlite3.Connection, model: str) -> None:
        """Forget the checkpoint that answered as `model`."""
        c.execute("DELETE FROM checkpoints WHERE model = ?", (model,))


_OPEN: Final = "status NOT IN ('succeeded', 'failed', 'cancelled')"


def _job(row: sqlite3.Row) -> JobRow:
    fields = {name: _value(row[name]) if name in _JSON else row[name] for name in row.keys()}  # noqa: SIM118
    return JobRow(**fields | {name: bool(row[name]) for name in ("wants_pause", "is_published")})


def _text(value: Any) -> str | None:
    return None if value is None else json.dumps(value, separators=(",", ":"), allow_nan=False)


def _value(text: str | None) -> Any:
    return None if text is None else json.loads(text)
