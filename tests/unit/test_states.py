"""The states of a job, walked at random: only what the table allows, and every job can still reach an end."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from loquetier.errors import JobStateError
from loquetier.training.states import TRANSITIONS, JobStatus, check_transition, resumed


class Walk(RuleBasedStateMachine):
    """A job as its owner and the engine move it."""

    def __init__(self) -> None:
        super().__init__()
        self.status = JobStatus.VALIDATING_FILES
        self.has_data = self.has_memory = False
        self.ended: JobStatus | None = None

    def _move(self, to: JobStatus) -> None:
        if to in TRANSITIONS[self.status]:
            check_transition("job", self.status, to)
            self.status = to
        else:
            with pytest.raises(JobStateError, match=f"is {self.status.value} and cannot become {to.value}"):
                check_transition("job", self.status, to)

    @rule()
    def data_arrives(self) -> None:
        if self.status.is_final or self.has_data:
            return
        self.has_data = True
        if self.status is not JobStatus.PAUSED:
            self._move(JobStatus.QUEUED)

    @rule()
    def memory_arrives(self) -> None:
        if self.status is JobStatus.QUEUED:
            self.has_memory = True
            self._move(JobStatus.RUNNING)

    @rule()
    def resume(self) -> None:
        if self.status is JobStatus.PAUSED:
            self._move(resumed(has_data=self.has_data, has_memory=self.has_memory))

    @rule(to=st.sampled_from([s for s in JobStatus if s.is_final or s is JobStatus.PAUSED]))
    def told(self, to: JobStatus) -> None:
        self._move(to)

    @invariant()
    def states_say_what_the_job_has(self) -> None:
        if self.status is JobStatus.RUNNING:
            assert self.has_memory
        if self.status is JobStatus.QUEUED:
            assert self.has_data and not self.has_memory
        if self.status is JobStatus.VALIDATING_FILES:
            assert not self.has_data

    @invariant()
    def an_end_is_an_end(self) -> None:
        if self.ended is not None:
            assert self.status is self.ended
        self.ended = self.status if self.status.is_final else None

    @invariant()
    def it_can_be_stopped_and_paused_anywhere(self) -> None:
        if not self.status.is_final:
            assert {JobStatus.CANCELLED, JobStatus.FAILED} <= TRANSITIONS[self.status]
            assert self.status is JobStatus.PAUSED or JobStatus.PAUSED in TRANSITIONS[self.status]


TestWalk = Walk.TestCase
TestWalk.settings = settings(max_examples=100, stateful_step_count=20, deadline=None)


def test_every_state_is_in_the_table_and_reachable() -> None:
    assert TRANSITIONS.keys() == set(JobStatus)
    reached = {JobStatus.VALIDATING_FILES}
    for _ in JobStatus:
        reached |= {to for status in reached for to in TRANSITIONS[status]}
    assert reached == set(JobStatus)


@pytest.mark.parametrize("before", [JobStatus.VALIDATING_FILES, JobStatus.QUEUED])
def test_without_memory_there_is_no_success_and_nothing_to_move(before: JobStatus) -> None:
    for after in (JobStatus.SUCCEEDED, JobStatus.DETACHED):
        with pytest.raises(JobStateError, match=f"is {before.value} and cannot become {after.value}"):
            check_transition("job", before, after)
