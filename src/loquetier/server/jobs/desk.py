"""A new job: checked against files, limits and the base, and on the disk before it is acknowledged. Any thread."""

from __future__ import annotations

import hashlib
import secrets
import sqlite3
import string
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import structlog

from loquetier.adapters.registry import check_name
from loquetier.adapters.spec import resolve_modules
from loquetier.checkpointing import check_checkpoints_fit
from loquetier.errors import (
    AdapterError,
    ConfigError,
    InsufficientStorageError,
    OutOfAdapterMemoryError,
    OutOfTrainMemoryError,
    ServeOnlyError,
)
from loquetier.server.auth import Principal
from loquetier.server.file_check import CHECKED_PURPOSE
from loquetier.server.file_desk import no_such_file
from loquetier.server.jobs.changes import NO_RETRY, JobChanges
from loquetier.server.jobs.running import RunningJobs, tell
from loquetier.server.jobs.settings import asked, resolve, resolved
from loquetier.server.models import ModelBook
from loquetier.server.problems import ApiError, bad, model_not_found
from loquetier.server.quota import check_quota
from loquetier.server.schemas.jobs import CreateJob
from loquetier.server.settings import ServerSettings
from loquetier.server.store.jobs import JobRow
from loquetier.server.store.store import Store

log = structlog.get_logger("loquetier.server.jobs")

ROUTE: Final = "fine_tuning.jobs"
_LETTERS: Final = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True)
class JobDesk:
    """Makes jobs."""

    store: Store
    settings: ServerSettings
    running: RunningJobs
    changes: JobChanges
    models: ModelBook

    def create(self, who: Principal, body: CreateJob, raw: bytes, key: str | None) -> JobRow:
        """A job, on the disk when this returns.

        Raises:
            ApiError: 400, 403, 404, 429; nothing was made. InsufficientStorageError.
        """
        digest = hashlib.sha256(raw).hexdigest()
        # Before anything is checked: files may have gone since, and the job that was made is still the answer.
        if key is not None and (made := self._made(who, key, digest)) is not None:
            return self.changes.find(who, made)
        job = self._new(who, body)
        self.store.fail_point("create.before_commit")
        with self.store.write() as c:
            self.store.know(c, who.owner, who.id)
            known = key and self.store.once.find(c, who.owner, ROUTE, key, digest)
            if not known:
                self._check_count(c, who)
                # What a job will have made stays, whatever it weighs: the next one finds the room taken.
                check_quota(self.settings, who, self.store.bytes_of(who.owner), 1, None)
                self.store.jobs.add(c, job)
                self.store.adapters.create(c, job.model, who.owner, "job", job.model, job.id)
                tell(self.store, c, job.id, f"Created fine-tuning job: {job.id}", once="created")
                if key:
                    self.store.once.note(c, who.owner, ROUTE, key, digest, job.id)
        self.store.fail_point("create.after_commit")
        if known:
            return self.changes.find(who, known)
        log.info("job_created", job=job.id, owner=who.owner)
        self.running.launch(job.id, is_restart=False)
        return job

    def _made(self, who: Principal, key: str, digest: str) -> str | None:
        """What this request made when it came before. Raises KeyReusedError."""
        with self.store.write() as c:
            return self.store.once.find(c, who.owner, ROUTE, key, digest)

    def _new(self, who: Principal, body: CreateJob) -> JobRow:
        base = self.running.runtime.base_name
        if self.running.runtime.config.serve_only:
            raise bad("this server was started with --serve-only and cannot train", code=ServeOnlyError.code)
        if body.model != base:
            if self.models.sees(who, body.model):
                raise bad(f"only the base {base!r} can be fine-tuned over HTTP", "model", "invalid_value")
            raise model_not_found(body.model)
        settings = asked(body)
        short = "".join(secrets.choice(_LETTERS) for _ in range(8))
        model = f"ft:{base}:{who.owner}:{body.suffix or ''}:{short}"
        self._check_settings(model, body, settings)
        for name, file_id in (("training_file", body.training_file), ("validation_file", body.validation_file)):
            if file_id is not None:
                self._check_file(who, name, file_id)
        try:
            check_name(f"{model}:ckpt-step-{10**9}")
        except ConfigError as error:
            raise bad(f"the model would be called {model!r}; shorten the suffix: {error}", "suffix") from error
        return JobRow(
            id=f"ftjob-{short}{secrets.token_hex(8)}",
            owner=who.owner,
            key_id=who.id,
            created_at=int(self.store.wall()),
            base=base,
            model=model,
            training_file=body.training_file,
            validation_file=body.validation_file,
            seed=settings["seed"],
            settings=settings,
            metadata=body.metadata,
        )

    def _check_settings(self, model: str, body: CreateJob, settings: dict[str, Any]) -> None:
        """Refuse what the job's start would refuse, as far as that goes without the data. Raises ApiError."""
        port = self.running.runtime.port
        wanted = None if body.training is None else body.training.max_seq_len
        if wanted is not None and wanted > port.max_context:
            raise bad(
                f"training.max_seq_len={wanted}: this server has room for {port.max_context} tokens of context; give "
                "at most that, or leave it out",
                "training.max_seq_len",
                "context_length_exceeded",
            )
        ready = resolved(resolve(settings, 1))
        try:
            modules = resolve_modules(ready.spec, port.targets)
            port.check_job(model, ready.spec, ready.training)
        except OutOfTrainMemoryError as error:
            raise bad(f"even with an example of two tokens, {error}"[:1000], "training", error.code) from error
        except (AdapterError, ConfigError, OutOfAdapterMemoryError) as error:
            raise bad(f"lora: {error}"[:1000], "lora", error.code) from error
        try:
            check_checkpoints_fit(self.store.data_dir.jobs, model, modules)
        except InsufficientStorageError as error:
            told = str(error).replace(str(self.store.data_dir.root), "the data directory")
            raise ApiError(error.status, told, code=error.code) from error

    def _check_file(self, who: Principal, param: str, file_id: str) -> None:
        file = self.store.files.find(file_id, who.owner)
        if file is None:
            raise no_such_file(file_id, param)
        if file.purpose != CHECKED_PURPOSE:
            raise bad(f"{file_id} has the purpose {file.purpose!r}; it must be {CHECKED_PURPOSE!r}", param)
        if file.status == "error":
            raise bad(f"{file_id} cannot be used: {file.status_details}"[:1000], param, "invalid_training_file")

    def _check_count(self, c: sqlite3.Connection, who: Principal) -> None:
        mine = who.jobs or self.settings.max_jobs_per_owner
        for count, limit, whose in (
            (self.store.jobs.num_open(c, who.owner), mine, "you have"),
            (self.store.jobs.num_open(c), self.settings.max_jobs, "this server has"),
        ):
            if count >= limit:
                raise ApiError(
                    429,
                    f"{whose} {count} jobs that have not ended; the limit is {limit}",
                    code="rate_limit_exceeded",
                    headers=NO_RETRY,
                )


def canonical(body: dict[str, Any]) -> bytes:
    """A body's bytes, whatever the order of its keys."""
    return msgspec.json.encode(body, order="sorted")
