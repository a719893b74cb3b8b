"""The virtual model: one adapter's view of the base, which looks like a model of its own.

It owns nothing but a name: the base is shared, the adapter's weights lie in the arena. It can leave its runtime
(`detach`), enter another one of the same base (`attach`), or do both (`migrate`), with its optimizer's state if it is
in training, while every other adapter of both runtimes goes on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace

from loquetier.arguments import Prompt
from loquetier.config import SamplingParams
from loquetier.engine.migration import AdapterImage, attach, detach
from loquetier.engine.request import TokenEvent
from loquetier.errors import AdapterInUseError, ConfigError
from loquetier.finetuning import FinetuneHandle, JobCallback
from loquetier.generation import Completion
from loquetier.runtime import AdapterInfo, Runtime
from loquetier.training.job import FinetuneJob, JobStatus


class VirtualModel:
    """One adapter of a runtime."""

    def __init__(self, runtime: Runtime, name: str, job: FinetuneHandle | None = None) -> None:
        self.runtime, self.name, self.job = runtime, name, job

    @property
    def info(self) -> AdapterInfo:
        """Version, size and users now. Raises AdapterNotFoundError when it is not served (any more)."""
        return self.runtime.adapter(self.name)

    def generate(self, prompt: Prompt, params: SamplingParams | None = None) -> Completion:
        """See `Runtime.generate`."""
        return self.runtime.generate(prompt, self.name, params)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[TokenEvent]:
        """See `Runtime.stream`."""
        return self.runtime.stream(prompt, self.name, params)

    def export(self, directory: str | os.PathLike[str], *, overwrite: bool = False) -> str:
        """See `Runtime.export_adapter`."""
        return self.runtime.export_adapter(self.name, directory, overwrite=overwrite)

    def detach(self) -> AdapterImage:
        """Leave the runtime: answers under way finish, nothing new is accepted, the job stops between two tapes.

        Raises:
            AdapterNotFoundError: neither served nor in training. ConfigError: its job has publish="checkpoint".
        """
        return detach_adapter(self.runtime, self.name)

    def migrate(self, runtime: Runtime, callbacks: Sequence[JobCallback | object] = ()) -> VirtualModel:
        """Move to another runtime of the same base. On an error there, it is put back where it was.

        Raises:
            AdapterMismatchError, AdapterExistsError, OutOfAdapterMemoryError.
        """
        image = self.detach()
        try:
            return attach_adapter(runtime, image, callbacks)
        except Exception:
            restored = attach_adapter(self.runtime, image, self.job.callbacks if self.job else ())
            self.job = restored.job
            raise


def detach_adapter(runtime: Runtime, name: str) -> AdapterImage:
    """`VirtualModel.detach` by name. The image remembers whether the job was running or paused."""
    loop, engine = runtime._loop, runtime._engine
    was = loop.call(lambda: _pause(runtime, name))
    is_served = loop.call(lambda: engine.registry.find(name) is not None)
    with runtime._served.in_memory(name) if is_served else nullcontext():
        image = _detached(runtime, name)
    if image.job is None or was is None:
        return image
    return replace(image, job=replace(image.job, status=was))


def _detached(runtime: Runtime, name: str) -> AdapterImage:
    loop, engine = runtime._loop, runtime._engine
    while True:
        try:
            return loop.call(lambda: detach(engine, name))
        except AdapterInUseError:
            continue  # each call waits for a step of the engine, which runs the open tape to its end


def _pause(runtime: Runtime, name: str) -> JobStatus | None:
    job: FinetuneJob | None = runtime._engine.jobs.find(name)
    if job is None:
        return None
    if job.config.publish == "checkpoint":
        raise ConfigError(
            f"job {name!r} publishes its checkpoints (publish='checkpoint'), and they do not move with it; cancel it "
            "first, or train with another publish setting"
        )
    was = job.status
    if was is JobStatus.RUNNING:  # what has not begun is refused by `detach`
        runtime._engine.jobs.set_status(job, JobStatus.PAUSED)
    return was


def attach_adapter(
    runtime: Runtime, image: AdapterImage, callbacks: Sequence[JobCallback | object] = ()
) -> VirtualModel:
    """Put a detached adapter into a runtime. Errors as `engine.migration.attach`."""
    handle = FinetuneHandle(runtime._engine, runtime._loop, callbacks)

    def enter() -> FinetuneJob | None:
        return attach(runtime._engine, image, handle.listen)

    try:
        job = runtime._loop.call(enter)
    except BaseException:
        handle.discard()
        raise
    if job is None:
        handle.discard()
    return VirtualModel(runtime, image.name, handle if job else None)
