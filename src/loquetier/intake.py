"""How a job gets into the engine: its data at hand, or still to be read on a thread of its own."""

from __future__ import annotations

import logging
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from loquetier.adapters.spec import AdapterSpec
from loquetier.arguments import Data, records_of
from loquetier.checkpointing import CheckpointSaver, NewJob, open_checkpoints
from loquetier.config import TrainingConfig
from loquetier.engine.engine import Engine
from loquetier.engine.loop import EngineLoop
from loquetier.errors import DataError, EngineStoppedError, typed
from loquetier.finetuning import FinetuneHandle
from loquetier.training.checkpoint_dir import CheckpointConfig
from loquetier.training.data import Example, encode_examples
from loquetier.training.job import FinetuneJob

log = logging.getLogger("loquetier.jobs")


@dataclass(frozen=True, kw_only=True, slots=True)
class JobOrder:
    """A job as it was asked for, its data not read yet."""

    name: str
    spec: AdapterSpec
    config: TrainingConfig
    data: Data
    eval_data: Data | None
    start_from: str | None
    """A served adapter whose weights it begins with."""
    tokenizer: Any
    max_seq_len: int
    """Examples are cut to this many tokens: the config's limit, or the engine's."""

    def load(self) -> NewJob:
        """Read, encode and check the data. Raises DataError."""
        examples = self._encode(self.data)
        try:
            evals = () if self.eval_data is None else self._encode(self.eval_data)
        except DataError as error:  # both have an Example 1
            raise DataError(f"eval_data: {error}") from error
        return NewJob(name=self.name, spec=self.spec, config=self.config, examples=examples, eval_examples=evals)

    def _encode(self, data: Data) -> tuple[Example, ...]:
        return encode_examples(records_of(data), self.tokenizer, self.max_seq_len)


class Intake:
    """Brings jobs in and knows the savers of those that write checkpoints."""

    def __init__(self, engine: Engine, loop: EngineLoop) -> None:
        self._engine, self._loop = engine, loop
        self._savers: list[tuple[CheckpointSaver, FinetuneJob]] = []

    def start(
        self, order: JobOrder, new: NewJob | None, handle: FinetuneHandle, place: CheckpointConfig | None
    ) -> None:
        """Queue the job. With `new`, its loaded data, as soon as there is memory; with None the data is read first, on
        a thread, and what goes wrong there fails the job.

        Raises:
            As `Jobs.start` and `open_checkpoints`: nothing was started, and `handle` is discarded.
        """
        try:
            if new is None:
                self._start_later(order, handle, place)
            else:
                self._start_now(order, new, handle, place)
        except BaseException:
            handle.discard()
            raise

    def save_all(self) -> None:
        """One more checkpoint of every job that could go on from it; engine thread only."""
        for saver, job in self._savers:
            if job.has_memory and not job.status.is_final:
                saver.save(job)

    def close(self) -> None:
        """Wait until every checkpoint is written; when the engine has stopped."""
        for saver, _ in self._savers:
            saver.close()

    def _start_now(self, order: JobOrder, new: NewJob, handle: FinetuneHandle, place: CheckpointConfig | None) -> None:
        """Queue the job, or take it up from its newest checkpoint. Its first word ties `handle` to it."""
        engine, jobs = self._engine, self._engine.jobs
        saver, image = open_checkpoints(engine, handle, place, new) if place else (None, None)
        listen = (saver or handle).listen

        def start() -> None:
            if image is not None and saver is not None:
                job = jobs.resume(image, listen, saver.served)
            else:
                data = (new.examples, new.eval_examples)
                saves = saver is not None
                job = jobs.start(new.name, new.spec, new.config, *data, listen, order.start_from, saves=saves)
            if saver is not None:
                self._note(saver, job)

        try:
            self._loop.call(start)
        except BaseException:
            if saver is not None:
                saver.close()
            raise

    def _start_later(self, order: JobOrder, handle: FinetuneHandle, place: CheckpointConfig | None) -> None:
        """Take the name, and return; the rest is done on a thread."""
        jobs = self._engine.jobs
        job = self._loop.call(lambda: jobs.reserve(order.name, order.spec, order.config, handle.listen))

        def run() -> None:
            with suppress(EngineStoppedError):  # a closed runtime has ended the job itself
                try:
                    self._prepare(order, job, handle, place)
                except EngineStoppedError:
                    raise
                except Exception as error:
                    log.warning("job %s cannot begin: %s", order.name, error)
                    reason = typed(error)
                    self._loop.call(lambda: jobs.refuse(job, reason))

        threading.Thread(target=run, name="loquetier-validation", daemon=True).start()

    def _prepare(
        self, order: JobOrder, job: FinetuneJob, handle: FinetuneHandle, place: CheckpointConfig | None
    ) -> None:
        """Read the data of a job that has its name, then queue it."""
        engine, jobs = self._engine, self._engine.jobs
        new = order.load()
        jobs.check_data(order.config, new.examples, new.eval_examples)
        saver, image = open_checkpoints(engine, handle, place, new) if place else (None, None)

        def supply() -> bool:
            data, listen, saves = (new.examples, new.eval_examples), (saver or handle).listen, saver is not None
            served = None if saver is None else saver.served
            jobs.supply(job, *data, listen, start_from=order.start_from, image=image, served=served, saves=saves)
            if saver is not None and not job.status.is_final:
                self._note(saver, job)
            return job.status.is_final

        has_ended = True
        try:
            has_ended = self._loop.call(supply)
        finally:
            if saver is not None and has_ended:
                saver.close()

    def _note(self, saver: CheckpointSaver, job: FinetuneJob) -> None:
        self._savers = [*(pair for pair in self._savers if pair[0].is_open), (saver, job)]
