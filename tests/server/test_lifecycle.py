"""A job's life by chance: created, paused, resumed, cancelled, the server restarted; held against a model in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from hypothesis.strategies import DataObject, data, sampled_from
from tests.server.fixtures import BASE, base_dir
from tests.server.live import Live
from tests.server.tuned import LONG, QUICK, create, job_of, tuned, upload, wait_for

__all__ = ["base_dir"]

JOBS = "/v1/fine_tuning/jobs"
UNDER_WAY = frozenset({"validating_files", "queued", "running"})
ENDED = frozenset({"succeeded", "failed", "cancelled"})
WORDS = {"pause": "The job was paused", "resume": "The job was resumed", "cancel": "The job was cancelled"}


@dataclass
class Expected:
    """What the model knows of a job."""

    ends_by_itself: bool
    state: str = "under way"
    changes: tuple[str, ...] = ()
    """Acknowledged ones, in order."""

    @property
    def states(self) -> frozenset[str]:
        """What the server may say."""
        if self.state != "under way":
            return frozenset({self.state})
        return UNDER_WAY | ({"succeeded"} if self.ends_by_itself else frozenset())

    def may(self, verb: str) -> bool:
        return self.state not in ENDED and (verb == "cancel" or (verb == "resume") == (self.state == "paused"))


class Life(RuleBasedStateMachine):
    """One data directory, one server at a time."""

    base: Path
    roots: Iterator[Path]

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.root = next(self.roots)
        self.jobs: dict[str, Expected] = {}
        self.live: Live = self.stack.enter_context(tuned(self.base, self.root))

    @initialize()
    def prepare(self) -> None:
        self.file = upload(self.live.client())

    @rule(kind=sampled_from([LONG, LONG, QUICK]))
    @precondition(lambda self: len(self.jobs) < 4)
    def create(self, kind: dict[str, Any]) -> None:
        made = create(self.live.client(), self.file, BASE, kind)
        assert made.id not in self.jobs
        self.jobs[made.id] = Expected(ends_by_itself=kind is QUICK)

    @rule(chosen=data(), verb=sampled_from(sorted(WORDS)))
    @precondition(lambda self: self.jobs)
    def change(self, chosen: DataObject, verb: str) -> None:
        self.ask(chosen.draw(sampled_from(sorted(self.jobs))), verb)

    def ask(self, job_id: str, verb: str) -> None:
        """One change, and what it must have been answered with."""
        job = self.jobs[job_id]
        answer = self.live.http("POST", f"{JOBS}/{job_id}/{verb}")
        if answer.status_code == 200:
            assert job.may(verb), (verb, job)
            job.changes += (verb,)
            job.state = {"pause": "paused", "resume": "under way", "cancel": "cancelled"}[verb]
            assert answer.json()["status"] in job.states
        else:
            assert answer.status_code == 400 and answer.json()["error"]["code"] == "invalid_job_state"
            assert answer.headers["x-should-retry"] == "false"
            if job.may(verb):  # it came to its end first
                assert job.ends_by_itself, (verb, job)
                wait_for(self.live, job_id, "succeeded")
                job.state = "succeeded"

    @rule()
    @precondition(lambda self: self.jobs)
    def restart(self) -> None:
        self.stack.close()
        self.live = self.stack.enter_context(tuned(self.base, self.root))

    @invariant()
    def the_server_says_the_same(self) -> None:
        listed = self.live.http("GET", f"{JOBS}?limit=100").json()["data"]
        assert [job["id"] for job in listed] == list(self.jobs)[::-1], "every acknowledged job, newest first"
        for shown in listed:
            job = self.jobs[shown["id"]]
            assert shown["status"] in job.states, (shown["status"], job)
            if shown["status"] == "succeeded":
                job.state = "succeeded"
            assert (shown["finished_at"] is not None) == (shown["status"] in ENDED)
            events = self.live.http("GET", f"{JOBS}/{shown['id']}/events?limit=100").json()
            told = [verb for e in events["data"][::-1] for verb, word in WORDS.items() if e["message"] == word]
            # A hundred events are the newest: a job of many steps may have told of its first changes before.
            assert tuple(told) == (job.changes[len(job.changes) - len(told) :] if events["has_more"] else job.changes)

    def teardown(self) -> None:
        try:
            for job_id, job in self.jobs.items():
                if job.state not in ENDED:
                    self.live.http("POST", f"{JOBS}/{job_id}/cancel")
            for job_id, job in self.jobs.items():
                ended = wait_for(self.live, job_id, *ENDED)
                assert ended["status"] == (job.state if job.state in ENDED else ended["status"])
                assert ended["status"] != "failed", ended
                if ended["status"] == "succeeded":
                    assert self.live.http("GET", f"/v1/models/{ended['fine_tuned_model']}").status_code == 200
                assert job_of(self.live, job_id)["status"] == ended["status"]
            self.live.runtime.check_integrity()
            assert self.live.services.tuning is not None
            self.live.services.tuning.store.check_integrity()
        finally:
            self.stack.close()


def bound(base: Path, root: Path) -> type[Life]:
    class Bound(Life):
        pass

    Bound.base, Bound.roots = base, (root / str(number) for number in count())
    return Bound


def live_through(base: Path, root: Path, *, lives: int, changes: int) -> None:
    """`lives` made-up lives of up to `changes` changes each; the same ones every time."""
    run_state_machine_as_test(
        bound(base, root),
        settings=settings(
            max_examples=lives, stateful_step_count=changes, deadline=None, derandomize=True, database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip


def test_a_life_with_every_change_before_and_after_a_restart(base_dir: Path, tmp_path: Path) -> None:
    """What few lives by chance may not come to."""
    life = bound(base_dir, tmp_path)()
    life.prepare()
    life.create(LONG)
    life.create(LONG)
    first, second = life.jobs
    for change in ("pause", "", "pause", "resume", "resume", "pause", "resume", "", "pause", "", "cancel", "resume"):
        if change:
            life.ask(first, change)
        else:
            life.restart()
        life.the_server_says_the_same()
    life.ask(second, "cancel")
    life.restart()
    life.the_server_says_the_same()
    life.teardown()
    assert life.jobs[first].changes == ("pause", "resume", "pause", "resume", "pause", "cancel")


def test_lives(base_dir: Path, tmp_path: Path) -> None:
    live_through(base_dir, tmp_path, lives=2, changes=8)


@pytest.mark.conform_full
def test_many_lives(base_dir: Path, tmp_path: Path) -> None:
    live_through(base_dir, tmp_path, lives=100, changes=25)
