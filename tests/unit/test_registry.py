"""Names and versions under any order of calls: every slot is freed exactly once, and no name ever means the base."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from loquetier.adapters.registry import ABSENT_SLOT, AdapterRegistry, AdapterVersion, check_name
from loquetier.adapters.spec import LoraSpec
from loquetier.engine.rows import BASE_SLOT
from loquetier.errors import AdapterExistsError, AdapterNotFoundError, ConfigError, IntegrityError

BASE = "base"
NAMES = ("math", "law", "org/team:x.1")
names = st.sampled_from(NAMES)


class RegistryMachine(RuleBasedStateMachine):
    """A model of names, users and freed slots beside the real thing."""

    acquired = Bundle("acquired")

    @initialize(keep=st.sampled_from([0, 1, 3]))
    def start(self, keep: int) -> None:
        self.freed: list[int] = []
        self.keep = keep
        self.registry = AdapterRegistry(BASE, self.freed.append, keep)
        self.kept: list[AdapterVersion] = []
        self.live: dict[str, AdapterVersion] = {}
        self.made: list[AdapterVersion] = []
        self.users: dict[AdapterVersion, int] = {}
        self.numbers: dict[str, int] = {}

    def _retired(self, version: AdapterVersion) -> None:
        self.kept.append(version)
        same = sorted((v for v in self.kept if v.name == version.name), key=lambda v: v.number)
        for old in same[: max(0, len(same) - self.keep)]:
            self.kept.remove(old)

    def _made(self, name: str, version: AdapterVersion) -> None:
        if name in self.live:
            self._retired(self.live[name])
        self.numbers[name] = self.numbers.get(name, 0) + 1
        assert (version.name, version.number) == (name, self.numbers[name])
        self.live[name] = version
        self.made.append(version)

    @rule(name=names)
    def add(self, name: str) -> None:
        slot = len(self.made)
        if name in self.live:
            with pytest.raises(AdapterExistsError, match="unload it first"):
                self.registry.add(name, slot, LoraSpec())
        else:
            self._made(name, self.registry.add(name, slot, LoraSpec()))

    @rule(name=names)
    def publish(self, name: str) -> None:
        self._made(name, self.registry.publish(name, len(self.made), LoraSpec()))

    @rule(name=names)
    def remove(self, name: str) -> None:
        if name not in self.live:
            with pytest.raises(AdapterNotFoundError):
                self.registry.remove(name)
        else:
            assert self.registry.remove(name) is self.live.pop(name)
            self.kept = [v for v in self.kept if v.name != name]

    @rule(data=st.data())
    def rollback(self, data: st.DataObject) -> None:
        if not self.made:
            return
        wanted = data.draw(st.sampled_from(self.made))
        if wanted.name not in self.live or wanted.slot == ABSENT_SLOT:
            with pytest.raises(AdapterNotFoundError):
                self.registry.rollback(wanted.name, wanted.number)
            return
        assert self.registry.rollback(wanted.name, wanted.number) is wanted
        old, self.live[wanted.name] = self.live[wanted.name], wanted
        self.kept = [v for v in self.kept if v is not wanted]
        if old is not wanted:
            self._retired(old)

    @rule()
    def make_room(self) -> None:
        idle = [v for v in self.kept if not self.users.get(v, 0)]
        for version in idle[:1]:
            slot = version.slot
            self.registry.drop(version)
            assert self.freed[-1] == slot
            self.kept.remove(version)

    @rule(target=acquired, name=names)
    def acquire(self, name: str) -> AdapterVersion | None:
        if name not in self.live:
            with pytest.raises(AdapterNotFoundError):
                self.registry.acquire(name)
            return None
        version = self.registry.acquire(name)
        assert version is self.live[name]
        self.users[version] = self.users.get(version, 0) + 1
        return version

    @rule(target=acquired, data=st.data())
    def acquire_pinned(self, data: st.DataObject) -> AdapterVersion | None:
        if not self.made:
            return None
        wanted = data.draw(st.sampled_from(self.made))
        if wanted.slot == ABSENT_SLOT:
            with pytest.raises(AdapterNotFoundError):
                self.registry.acquire(wanted.label)
            return None
        assert self.registry.acquire(wanted.label) is wanted
        self.users[wanted] = self.users.get(wanted, 0) + 1
        return wanted

    @rule(version=consumes(acquired))
    def release(self, version: AdapterVersion | None) -> None:
        if version is not None:
            self.registry.release(version)
            self.users[version] -= 1

    @invariant()
    def books_agree(self) -> None:
        if not hasattr(self, "registry"):
            return
        self.registry.check_integrity()
        assert len(set(self.freed)) == len(self.freed), "a slot was freed twice"
        alive = {
            slot for slot, v in enumerate(self.made) if v in (*self.live.values(), *self.kept) or self.users.get(v, 0)
        }
        assert set(self.freed) == set(range(len(self.made))) - alive
        assert {v.slot for v in self.registry.versions} == alive
        assert set(self.registry.names) == self.live.keys()
        for name in NAMES:
            if name in self.live:
                assert self.registry.resolve(name) is self.live[name]
            else:
                with pytest.raises(AdapterNotFoundError):
                    self.registry.resolve(name)
        assert self.registry.resolve(BASE).slot == BASE_SLOT


RegistryMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestRegistry = RegistryMachine.TestCase


@pytest.mark.parametrize(
    "model", ["", "maths", "MATH", "math@", "math@2", "math@01", "math@1@1", "@1", "base@0", "base@", " math"]
)
def test_what_is_not_served_is_never_the_base(model: str) -> None:
    registry = AdapterRegistry(BASE, lambda slot: None)
    registry.add("math", 0, LoraSpec())
    with pytest.raises(AdapterNotFoundError, match=r"there are: (base, math|math@1)\b"):
        registry.resolve(model)


def test_an_old_version_answers_by_number_while_it_is_used() -> None:
    freed: list[int] = []
    registry = AdapterRegistry(BASE, freed.append)
    registry.add("math", 0, LoraSpec())
    first = registry.acquire("math")
    registry.publish("math", 1, LoraSpec())
    assert registry.resolve("math").number == 2 and registry.resolve("math@1") is first and not freed
    registry.release(first)
    assert freed == [0]
    with pytest.raises(
        AdapterNotFoundError, match=r"'math@1' is not in memory; there are: math@2.*keep_versions \(now 0"
    ):
        registry.resolve("math@1")


def test_rolling_back_and_forth() -> None:
    freed: list[int] = []
    registry = AdapterRegistry(BASE, freed.append, keep_versions=2)
    for slot in range(5):
        registry.publish("math", slot, LoraSpec())
    assert freed == [0, 1] and registry.resolve("math").number == 5
    assert registry.rollback("math", 3) is registry.resolve("math") and registry.resolve("math@5").slot == 4
    assert registry.publish("math", 5, LoraSpec()).number == 6, "a number is never reused"
    assert freed == [0, 1, 2], "of 3, 4 and 5 the last two stay"
    registry.rollback("math", 5)
    registry.check_integrity()
    with pytest.raises(AdapterNotFoundError, match=r"version 3 of 'math'.*there are: 4, 5, 6.*keep_versions \(now 2\)"):
        registry.rollback("math", 3)
    registry.remove("math")
    assert sorted(freed) == [0, 1, 2, 3, 4, 5] and registry.versions == []


def test_numbers_are_not_reused_after_unloading() -> None:
    registry = AdapterRegistry(BASE, lambda slot: None)
    registry.add("math", 0, LoraSpec())
    registry.remove("math")
    assert registry.add("math", 1, LoraSpec()).number == 2


def test_releasing_too_often_is_our_bug() -> None:
    registry = AdapterRegistry(BASE, lambda slot: None)
    version = registry.add("math", 0, LoraSpec())
    with pytest.raises(IntegrityError, match="more often"):
        registry.release(version)


@pytest.mark.parametrize("name", ["", "a@1", "../x", "a/../b", "/abs", "-x", "a b", "a\n", "é", "x" * 129, ".hidden"])
def test_names_that_could_be_something_else_are_refused(name: str) -> None:
    with pytest.raises(ConfigError):
        check_name(name)


@pytest.mark.parametrize("name", ["math", "org/model", "a.b-c_d:e", "x" * 128, "7b"])
def test_names_that_are_fine(name: str) -> None:
    assert check_name(name) == name


def test_the_bases_name_is_taken() -> None:
    with pytest.raises(AdapterExistsError):
        AdapterRegistry(BASE, lambda slot: None).add(BASE, 0, LoraSpec())
