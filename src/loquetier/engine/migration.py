"""Taking an adapter out of an engine with all that belongs to it, and putting it into another one of the same base.

The base is never copied: an image holds the adapter's factors and, if it is in training, its job between two tapes.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from loquetier.adapters.spec import AdapterSpec, LoraSpec, resolve_modules
from loquetier.engine.engine import Engine
from loquetier.engine.trainer import JobListener
from loquetier.errors import AdapterInUseError, AdapterMismatchError, AdapterNotFoundError, JobStateError
from loquetier.training.job import FinetuneJob, JobImage, JobStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterImage:
    """One adapter outside any engine."""

    name: str
    base_fingerprint: str
    spec: AdapterSpec
    factors: dict[str, tuple[Tensor, ...]] | None
    """By module path, in PEFT's orientation, as served last; None when nothing was published yet."""
    job: JobImage | None
    """Its job, if it was in training."""
    template_fingerprint: str | None = None
    """Of what was served last."""


def detach(engine: Engine, name: str) -> AdapterImage:
    """Take `name` out: it stops answering, requests under way end on it, its job ends as DETACHED.

    Raises:
        AdapterNotFoundError: neither served nor in training. AdapterInUseError: its job has rows between forward and
        backward, or an evaluation running; pause it and try again after the next steps. JobStateError: its job has not
        begun. Nothing changed.
    """
    job = engine.jobs.find(name)
    is_served = name in engine.registry.names
    if job is None and not is_served:
        raise AdapterNotFoundError(f"no adapter {name[:140]!r} is loaded or in training")
    if job is not None and not job.has_memory:
        raise JobStateError(f"job {name!r} is {job.status.value} and has not begun; cancel it and start it elsewhere")
    if job is not None and (job.has_open_rows or job.evaluation is not None):
        raise AdapterInUseError(f"job {name!r} is in the middle of a step; pause it and wait for the step's end")
    factors = engine.adapters.factors(name)[2] if is_served else None
    version = engine.registry.resolve(name) if is_served else None
    image = AdapterImage(
        name=name,
        base_fingerprint=engine.base.fingerprint,
        spec=version.spec if version else (job.spec if job else LoraSpec()),
        factors=factors,
        job=job.image() if job else None,
        template_fingerprint=version.template_fingerprint if version else None,
    )
    if is_served:
        engine.adapters.unload(name)
    if job is not None:
        engine.jobs.set_status(job, JobStatus.DETACHED)
    return image


def attach(engine: Engine, image: AdapterImage, listener: JobListener) -> FinetuneJob | None:
    """Put an image into `engine`: served at once, and its job, if any, goes on bit for bit.

    Raises:
        AdapterMismatchError: it was made on another base. AdapterExistsError, OutOfAdapterMemoryError: nothing changed.
    """
    if image.base_fingerprint != engine.base.fingerprint:
        raise AdapterMismatchError(
            f"adapter {image.name!r} was detached from another base (fingerprint {image.base_fingerprint[:12]}...) "
            f"than {engine.base.name!r} ({engine.base.fingerprint[:12]}...); attach it to a runtime of the same base"
        )
    if image.factors is not None:
        modules = resolve_modules(image.spec, engine.base.targets)
        engine.adapters.load(image.name, image.spec, modules, image.factors, image.template_fingerprint)
    if image.job is None:
        return None
    try:
        job: FinetuneJob = engine.jobs.restore(image.job, listener)
        return job
    except Exception:
        if image.factors is not None:
            engine.adapters.unload(image.name)
        raise
