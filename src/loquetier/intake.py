"""How a job gets into the engine: its data at hand, or still to be read on a thread of its own."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import suppress

from loquetier.adapters.spec import AdapterSpec
from loquetier.checkpointing import CheckpointSaver, NewJob, open_checkpoints
from loquetier.config import TrainingConfig
from loquetier.engine.engine import Engine
from loquetier.engine.loop import EngineLoop
from loquetier.errors import EngineError, EngineStoppedError, LoquetierError
from loquetier.finetuning import FinetuneHandle
from loquetier.training.checkpoint_dir import CheckpointConfig
from loquetier.training.job import FinetuneJob

log = logging.getLogger("loquetier.jobs")

OnSaver = Callable[[CheckpointSaver, FinetuneJob], None]
"""Told on the engine's thread of the saver of a job that was queued."""


def start_now(
    engine: Engine,
    loop: EngineLoop,
    handle: FinetuneHandle,
    new: NewJob,
    start_from: str | None,
    place: CheckpointConfig | None,
    on_saver: OnSaver,
) -> None:
    """Queue the job, or take it up from its newest checkpoint. Its first word ties `handle` to it.

    Raises:
        As `Jobs.start` and `open_checkpoints`: nothing was started.
    """
    saver, image = open_checkpoints(engine, handle, place, new) if place else (None, None)
    listen, jobs = (saver or handle).listen, engine.jobs

    def start() -> None:
        if image is not None and saver is not None:
            job = jobs.resume(image, listen, saver.served)
        else:
            data = (new.examples, new.eval_examples)
            job = jobs.start(new.name, new.spec, new.config, *data, listen, start_from, saves=saver is not None)
        if saver is not None:
            on_saver(saver, job)

    try:
        loop.call(start)
    except BaseException:
        if saver is not None:
            saver.close()
        raise


def start_later(
    engine: Engine,
    loop: EngineLoop,
    handle: FinetuneHandle,
    name: str,
    spec: AdapterSpec,
    config: TrainingConfig,
    load: Callable[[], NewJob],
    start_from: str | None,
    place: CheckpointConfig | None,
    on_saver: OnSaver,
) -> None:
    """Take the name, and return; `load` runs on a thread, then the job is queued. What goes wrong there fails the job.

    Raises:
        AdapterError, ConfigError: name or spec; nothing was started.
    """
    jobs = engine.jobs
    job = loop.call(lambda: jobs.reserve(name, spec, config, handle.listen))

    def prepare() -> None:
        new = load()
        jobs.check_data(config, new.examples, new.eval_examples)
        saver, image = open_checkpoints(engine, handle, place, new) if place else (None, None)

        def supply() -> bool:
            data, listen, saves = (new.examples, new.eval_examples), (saver or handle).listen, saver is not None
            served = None if saver is None else saver.served
            jobs.supply(job, *data, listen, start_from=start_from, image=image, served=served, saves=saves)
            if saver is not None and not job.status.is_final:
                on_saver(saver, job)
            return job.status.is_final

        has_ended = True
        try:
            has_ended = loop.call(supply)
        finally:
            if saver is not None and has_ended:
                saver.close()

    def run() -> None:
        with suppress(EngineStoppedError):  # a closed runtime has ended the job itself
            try:
                prepare()
            except EngineStoppedError:
                raise
            except Exception as error:
                log.warning("job %s cannot begin: %s", name, error)
                typed = error if isinstance(error, LoquetierError) else EngineError(f"{type(error).__name__}: {error}")
                loop.call(lambda: jobs.refuse(job, typed))

    threading.Thread(target=run, name="loquetier-validation", daemon=True).start()
