"""`loquetier jobs`: fine-tuning jobs of a running server. How they look is `cli_view`'s business."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loquetier.cli_options import DEFAULT_URL, JsonOption, KeyOption, UrlOption, with_options

if TYPE_CHECKING:
    from loquetier.cli_client import Api

JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="The job's id, ftjob-...")]
PATH = "/v1/fine_tuning/jobs"
FINAL = frozenset({"succeeded", "failed", "cancelled"})
_SERVERS_DEFAULTS = {"num_epochs": "by the data: 3, more below 34 examples", "batch_size": "by the data, at most 8"}
_PAGE = 100
_FILE_POLL_SECONDS = 0.5


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    jobs = typer.Typer(no_args_is_help=True, help="Fine-tuning jobs of a running server.")
    jobs.command("list")(list_jobs)
    jobs.command("show")(show)
    jobs.command("create")(with_options(create, _SERVERS_DEFAULTS))
    jobs.command("watch")(watch_job)
    jobs.command("events")(events)
    jobs.command("cancel")(_order("cancel", "End a job; what it has published stays."))
    jobs.command("pause")(_order("pause", "Stop a job after its step; it keeps its state."))
    jobs.command("resume")(_order("resume", "Let a paused job go on."))
    app.add_typer(jobs, name="jobs")


def list_jobs(
    limit: Annotated[int, typer.Option(min=1, help="Newest jobs to list.")] = 20,
    status: Annotated[str | None, typer.Option(help="Only those in this state, as 'running'.")] = None,
    as_json: JsonOption = False,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = None,
) -> None:
    """Your jobs, newest first."""
    from loquetier.cli_client import connected, print_json
    from loquetier.cli_view import job_table, print_table

    with connected(url, api_key) as api:
        wanted = (job for job in newest_first(api, PATH) if status is None or job.get("status") == status)
        found = list(islice(wanted, limit))
    if as_json:
        print_json(found)
    else:
        print_table(job_table(found))


def show(
    job: JobArgument, as_json: JsonOption = False, url: UrlOption = DEFAULT_URL, api_key: KeyOption = None
) -> None:
    """One job: state, data, settings, and what it has made."""
    from loquetier.cli_client import connected, print_json
    from loquetier.cli_view import job_details, print_table

    with connected(url, api_key) as api:
        found = api.get(job_path(job))
    if as_json:
        print_json(found)
    else:
        print_table(job_details(found))


def create(
    training_file: Annotated[
        str, typer.Option(help="A file of this machine, which is uploaded, or the id of one, file-...")
    ],
    model: Annotated[str, typer.Option(help="What to train on: the name of the base.")],
    training: Mapping[str, Any],
    lora: Mapping[str, Any],
    validation_file: Annotated[str | None, typer.Option(help="The same, for evaluations.")] = None,
    suffix: Annotated[str | None, typer.Option(help="Part of the new model's name.")] = None,
    metadata: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="Kept with it; repeatable.")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(min=1, help="Steps between two checkpoints.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Follow it to its end, as `jobs watch` does.")] = False,
    as_json: JsonOption = False,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = None,
) -> None:
    """Start a job; prints its id. Files of this machine are uploaded first."""
    from loquetier.cli_client import connected, print_json

    pairs = dict(_pair(text) for text in metadata or [])
    settings = dict(training)
    with connected(url, api_key) as api:
        body: dict[str, Any] = {"model": model, "training_file": _file_id(api, training_file)}
        if validation_file is not None:
            body["validation_file"] = _file_id(api, validation_file)
        if "seed" in settings:
            body["seed"] = settings.pop("seed")
        if checkpoint_every is not None:
            settings["checkpoint_every"] = checkpoint_every
        optional = {"suffix": suffix, "metadata": pairs, "training": settings, "lora": dict(lora)}
        found = api.post(PATH, body | {name: value for name, value in optional.items() if value})
        if as_json:
            print_json(found)
        else:
            print(found["id"], flush=True)
        if watch:
            _watch(api, found["id"])


def watch_job(job: JobArgument, url: UrlOption = DEFAULT_URL, api_key: KeyOption = None) -> None:
    """Follow a job to its end. Exit code 0: succeeded; 1: failed or cancelled. Ctrl-C stops watching, not the job."""
    from loquetier.cli_client import connected

    with connected(url, api_key) as api:
        _watch(api, job)


def _watch(api: Api, job: str) -> None:
    from loquetier.cli_view import console
    from loquetier.cli_watch import follow, show_progress

    ended = show_progress(follow(api, job), console())
    if ended.get("status") != "succeeded":
        raise typer.Exit(1)


def events(
    job: JobArgument,
    limit: Annotated[int, typer.Option(min=1, help="Newest events to list.")] = 20,
    as_json: JsonOption = False,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = None,
) -> None:
    """What happened to a job, oldest first."""
    from loquetier.cli_client import connected, print_json
    from loquetier.cli_view import console, event_line

    with connected(url, api_key) as api:
        found = list(islice(newest_first(api, f"{job_path(job)}/events"), limit))
    found.reverse()
    if as_json:
        print_json(found)
        return
    for event in found:
        console().print(event_line(event))


def _order(verb: str, text: str) -> Callable[..., None]:
    def order(job: JobArgument, url: UrlOption = DEFAULT_URL, api_key: KeyOption = None) -> None:
        from loquetier.cli_client import connected, printable

        with connected(url, api_key) as api:
            found = api.post(f"{job_path(job)}/{verb}")
        print(f"{printable(str(found.get('id', job)))}: {printable(str(found.get('status', 'done')))}")

    order.__doc__ = text
    return order


def job_path(job: str) -> str:
    """Where a job is; raises a usage error for what cannot be an id."""
    if not job or not all(c.isalnum() or c in "-_" for c in job):
        raise typer.BadParameter(f"{job!r} is not the id of a job", param_hint="JOB")
    return f"{PATH}/{job}"


def newest_first(api: Api, path: str) -> Iterator[dict[str, Any]]:
    """Every object of a list, page by page as they are asked for."""
    after = None
    while True:
        page = api.get(path, limit=_PAGE, after=after)
        data = page.get("data") or []
        yield from data
        if not page.get("has_more") or not data:
            return
        after = data[-1]["id"]


def _file_id(api: Api, given: str) -> str:
    """The id of a file on the server: `given` itself, or that of its upload once the server has read it."""
    import time

    from loquetier.cli_client import ServerRefusedError, printable

    path = Path(given)
    if not path.exists():
        if given.startswith("file-"):
            return given
        raise typer.BadParameter(f"{given!r} is neither a file of this machine nor the id of one (file-...)")
    found = api.upload(path)
    while found.get("status") not in (None, "processed", "error"):
        time.sleep(_FILE_POLL_SECONDS)
        found = api.get(f"/v1/files/{found['id']}")
    if found.get("status") == "error":
        detail = printable(str(found.get("status_details") or "the server cannot use it"))
        raise ServerRefusedError(f"{given}: {detail}", "invalid_training_file", 400)
    return str(found["id"])


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise typer.BadParameter(f"{text!r} is not KEY=VALUE", param_hint="--metadata")
    return key, value
