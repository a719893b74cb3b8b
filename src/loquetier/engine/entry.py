"""What a job passes before it may queue, and what it gets when there is memory. Engine thread only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from loquetier.adapters.arena import Arena, num_elements
from loquetier.adapters.registry import check_name
from loquetier.adapters.spec import ModulePlan, resolve_modules
from loquetier.engine.admission import Admission, Ticket
from loquetier.engine.residency import Residency
from loquetier.errors import ConfigError, LoquetierError, ServeOnlyError
from loquetier.training.example import Example
from loquetier.training.job import FinetuneJob, JobImage
from loquetier.training.optimizer import AdapterOptimizer, check_ratio


@dataclass(frozen=True, kw_only=True, slots=True)
class Entrant:
    """A job that wants to queue, with its data."""

    job: FinetuneJob
    examples: tuple[Example, ...]
    eval_examples: tuple[Example, ...]
    saves: bool
    """Copies of it will be made for checkpoints."""
    start_from: str | None = None
    """A served version to continue from; counts only without `image`."""
    image: JobImage | None = None
    """The state to go on from."""
    catches_up: bool = False
    """See `Ticket`."""
    served: tuple[Tensor, int] | None = None
    """See `Ticket`."""


def check_trainable(name: str, base_name: str, *, serve_only: bool) -> None:
    """Raises ServeOnlyError: no job can run. ConfigError: none of this name."""
    if serve_only:
        raise ServeOnlyError(
            f"{name!r} cannot be trained: this engine was started with serve_only (--serve-only), which dropped "
            "the weights that a backward needs; start it without"
        )
    check_name(name)
    if name == base_name:
        raise ConfigError(f"{name!r} is the base's name; choose another for the adapter")


def ticket_of(admission: Admission, entrant: Entrant, lost: Callable[[FinetuneJob, LoquetierError], None]) -> Ticket:
    """Check a job against the base and the memory, and give it its data.

    `lost` is told later, when the version that the job starts from cannot come into memory.

    Raises:
        As `Jobs.start`; the job is as it was.
    """
    job, image, start_from = entrant.job, entrant.image, entrant.start_from
    examples, eval_examples = entrant.examples, entrant.eval_examples
    residency, modules = admission.residency, resolve_modules(job.spec, admission.trainer.base.targets)
    check_ratio(job.config, modules)
    source = None
    if start_from is not None and image is None:
        _check_same_layout(residency, start_from, modules)
        source = residency.acquire(start_from, is_long=True)
    try:
        needs = admission.model.needs(job.config, modules, examples, eval_examples, saves=entrant.saves)
        ticket = Ticket(
            job=job,
            modules=modules,
            needs=needs,
            source=source,
            image=image,
            catches_up=entrant.catches_up,
            served=entrant.served,
        )
        admission.check_possible(ticket)
        if source is not None:  # it is there when the job begins, or the job fails
            residency.start(source, admission.look_again, lambda error: lost(job, error))
    except BaseException:
        if source is not None:
            residency.drop(source)
        raise
    job.give_data(examples, eval_examples)
    if image is not None:
        job.history = list(image.history)  # known before it has memory: its observers begin with it
    job.estimate = needs.estimate
    return ticket


def _check_same_layout(residency: Residency, model: str, modules: tuple[ModulePlan, ...]) -> None:
    held = residency.registry.resolve(model).modules
    if held != modules:
        raise ConfigError(
            f"start_from={model!r}: its method, modules, ranks or scales ({len(held)} modules, "
            f"{num_elements(held)} weights) differ from the job's ({len(modules)} modules, "
            f"{num_elements(modules)} weights); use the same spec"
        )


def fill(ticket: Ticket, arena: Arena, slot: int) -> None:
    """The job's first weights, and its optimizer."""
    job = ticket.job
    if ticket.source is not None:
        arena.copy(ticket.source.version.slot, slot)
    elif ticket.image is None:
        arena.methods[slot].initialize(arena.factors[slot], ticket.modules, job.config.seed, arena.base_weight)
        arena.refresh(slot)
    optimizer = AdapterOptimizer(arena.flat(slot), ticket.modules, job.config)
    job.give_memory(slot, optimizer)
    if ticket.image is not None:
        job.restore(ticket.image)
        arena.refresh(slot)
