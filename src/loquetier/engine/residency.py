"""Which adapter versions lie in the arena, and who waits for one. Engine thread only.

Every use of a version is a `Hold`. It is ready at once where the version is in the arena; else it waits, and only it:
the files are read and checked on another thread, and one copy between two steps brings the weights in. Who makes room
for whom is decided in `residency_policy`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count

from torch import Tensor

from loquetier.adapters.arena import Arena, Run
from loquetier.adapters.host_tier import HostTier
from loquetier.adapters.layouts import Layouts
from loquetier.adapters.packed import PackedAdapter
from loquetier.adapters.registry import ABSENT_SLOT, AdapterRegistry, AdapterVersion
from loquetier.adapters.spec import AdapterSpec
from loquetier.engine.arena_map import ArenaMap
from loquetier.engine.background import Result
from loquetier.engine.hold import Hold, HoldState
from loquetier.engine.residency_books import ResidencyTotals, check_books
from loquetier.engine.residency_policy import (
    Claim,
    Demand,
    Piece,
    PieceState,
    Placement,
    best_window,
    decide,
    drained_for,
    is_possible,
    may_use,
)
from loquetier.engine.version_files import VersionFiles, unavailable
from loquetier.engine.waiters import Waiters
from loquetier.errors import IntegrityError, LoquetierError, OutOfAdapterMemoryError

log = logging.getLogger("loquetier.residency")

MOST_DEMANDS = 256
"""Versions that wait and are looked at, oldest first; the others' turn comes when these are served."""


class Residency:
    """Brings versions into the arena when somebody needs them, and takes idle ones out.

    Args:
        files: reads and writes them, on other threads.
        patience: seconds that a version is waited for before others make room for it by draining.
        host_bytes: host memory for packed weights.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        arena: Arena,
        registry: AdapterRegistry,
        files: VersionFiles,
        *,
        patience: float,
        host_bytes: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.arena, self.registry, self.files = arena, registry, files
        self.patience, self._clock = patience, clock
        files.changed = self.look_again
        self.host: HostTier[AdapterVersion] = HostTier(host_bytes)
        self.totals = ResidencyTotals()
        self.layouts = Layouts()
        self.forgotten: Callable[[AdapterVersion], object] = lambda version: None
        """Told of a version that nothing means or uses any more: its files are not needed."""
        self.reserved_bytes: Callable[[], int] = lambda: 0
        """Bytes that jobs will publish to."""
        self.loaded: Callable[[float], object] = lambda seconds: None
        """Told how long each version took to come in."""
        self.room_changed: Callable[[], object] = lambda: None
        """Told when a job that waits for room should look again."""
        self._news = False
        """Something changed since `tick` was called last."""
        self._waiting = Waiters()
        self._map = ArenaMap(arena, registry, files)
        self._claims: tuple[Claim, ...] = ()
        self._draining: frozenset[int] = frozenset()
        self._next_aged = math.inf
        """When the next of those who wait becomes impatient."""
        self._room = 0
        """Bytes that the first of the jobs that wait needs."""
        self._room_since = 0.0
        self._num_holds = 0
        self._uses = count(1)
        arena.reclaim, arena.claimed = self._reclaim, self._claimed_runs
        registry.dropped = self._dropped

    # --- uses ---

    def acquire(self, model: str, *, is_long: bool = False) -> Hold:
        """Begin to use what `model` means; the version stays registered until `drop`.

        Raises:
            AdapterNotFoundError: nothing answers under this name.
        """
        version = self.registry.acquire(model)
        self._num_holds += not version.is_base
        return Hold(version, is_long)

    def start(self, hold: Hold, ready: Callable[[], None], fail: Callable[[LoquetierError], None]) -> None:
        """Have `ready` called when the version is in the arena, now or between two later steps, or else `fail`.

        Raises:
            OutOfAdapterMemoryError: it could never come in, because of pins and jobs.
        """
        version = hold.version
        assert hold.state is HoldState.NEW
        hold.ready, hold.fail = ready, fail
        version.last_used = next(self._uses)
        if version.is_base or (self._may_grant(version) and not (version.holders == 0 and self._idle_waiter())):
            self._grant(hold)
            return
        if version.slot < 0:
            self._check_possible(version)
        hold.state, hold.since = HoldState.WAITING, self._clock()
        self._waiting.add(hold)
        self._news = True

    def drop(self, hold: Hold) -> None:
        """A use is over, in whatever state it was."""
        version, state = hold.version, hold.state
        assert state is not HoldState.ENDED
        hold.state = HoldState.ENDED
        if state is HoldState.WAITING:
            self._waiting.remove(hold)
            self._news = True
        if not version.is_base:
            self._num_holds -= 1
            if state is HoldState.HELD:
                version.holders -= 1
                if hold.is_long:
                    self._map.long[version] -= 1
                self._news |= version.holders == 0 or hold.is_long
        self.registry.release(version)

    def _grant(self, hold: Hold) -> None:
        hold.state = HoldState.HELD
        if not hold.version.is_base:
            hold.version.holders += 1
            if hold.is_long:
                self._map.long[hold.version] += 1
        hold.ready()

    def preload(self, model: str, done: Callable[[LoquetierError | None], None] = lambda error: None) -> None:
        """Bring a version in for nobody in particular. Raises as `acquire` and `start`."""
        hold = self.acquire(model)

        def end(error: LoquetierError | None) -> None:
            self.drop(hold)
            done(error)

        try:
            self.start(hold, lambda: end(None), end)
        except BaseException:
            self.drop(hold)
            raise

    def publish(self, name: str, slot: int, spec: AdapterSpec, template_fingerprint: str | None) -> AdapterVersion:
        """Make the weights in a slot of the arena the live version of `name`."""
        modules = self.arena.modules(slot)
        version = self.registry.publish(
            name, slot, spec, template_fingerprint, modules=modules, num_bytes=self.arena.slot_bytes(slot)
        )
        version.last_used = next(self._uses)
        self._news = True
        return version

    def keep_pins(self) -> None:
        """Bring in what is pinned and not there: a new version of a pinned name, say."""
        for name in self.registry.pinned:
            version = self.registry.find(name)
            if version is not None and version.slot < 0 and version not in self._waiting:
                try:
                    self.preload(name)
                except OutOfAdapterMemoryError as error:
                    log.warning("%s is pinned and cannot come in: %s", version.label, error)

    @property
    def num_waiting(self) -> int:
        """Uses that wait for their version."""
        return sum(self._waiting.counts().values())

    @property
    def waiting_names(self) -> list[str]:
        """Adapters that are waited for."""
        return [v.name for v in self._waiting]

    # --- the step ---

    @property
    def has_news(self) -> bool:
        """`tick` may have something to do."""
        return self._news and bool(self._waiting or self._room or self._claims)

    def look_again(self) -> None:
        """What decides about the arena has changed: a pin, say."""
        self._news = True

    def tick(self) -> None:
        """Serve who waits as far as it goes now. Cheap when nothing has changed."""
        if not (self.has_news or self._clock() >= self._next_aged):
            return
        self._news = False
        self._grant_waiting()  # who has its weights here already comes first
        pieces = self._map.pieces()
        room = self._room_for_job(pieces)
        before, kept = self._kept_for_publishing(pieces)
        demands = self._demands(before=min(before, self._room_since if room else math.inf))
        versions = {id(v): v for v in self._waiting}
        decision = decide(pieces, demands, self._claims, self._reserve)
        self._claims, self._draining = decision.claims, decision.draining | room | kept
        for placement in decision.placements:
            self._place(versions[placement.key], placement)
        left = {d.key for d in demands} - {p.key for p in decision.placements}
        if left or any(p.evict for p in decision.placements):
            self.files.save_one()  # memory is short: what training published should be able to leave too
        if left:
            self._fail_impossible([versions[key] for key in left])
        self._grant_waiting()

    def _grant_waiting(self) -> None:
        """Who waits for a version that is here, as far as jobs keep their room."""
        for version in self._waiting.resident():
            if self._may_grant(version):
                self._grant_all(version)

    def _may_grant(self, version: AdapterVersion) -> bool:
        """An idle version is reused only while jobs keep the room that they will publish to."""
        if not version.is_resident or version.slot in self._draining:
            return False
        if version.holders or not self._reserve or self.arena.free_bytes >= self.reserved_bytes():
            return True
        pieces = self._map.pieces()
        own = next(p for p in pieces if p.slot == version.slot)
        return own.state is not PieceState.IDLE or may_use(pieces, own.size, self._reserve)

    def _idle_waiter(self) -> AdapterVersion | None:
        """Of the versions that are here and may not be used yet, the one that is waited for longest."""
        idle = (v for v in self._waiting.resident() if not v.holders and v.slot not in self._draining)
        return next(idle, None)

    def _kept_for_publishing(self, pieces: list[Piece]) -> tuple[float, frozenset[int]]:
        """Slots that drain so that jobs have their room, and who has waited for theirs too long; who came since waits.

        Returns:
            Only demands of before this time are served; slots.
        """
        reserve, waiter, before = self._reserve, self._idle_waiter(), math.inf
        if not reserve:
            return before, frozenset()
        if waiter is not None and self._clock() - self._waiting.since(waiter) >= self.patience:
            before = self._waiting.since(waiter)
            reserve += waiter.num_bytes // self.arena.itemsize
        unsaved = {v.slot for v in self.registry.versions if v.is_live and v.source is None}
        movable = [replace(p, state=PieceState.FIXED) if p.slot in unsaved else p for p in pieces]
        return before, drained_for(movable, reserve)

    def want_room(self, num_bytes: int) -> None:
        """The first of the jobs that wait needs so much free or idle memory; 0 = none does (any more).

        After `patience` adapters drain for it, and who came later waits.
        """
        if self._room and not num_bytes:
            self._news = True
        elif num_bytes and not self._room:
            self._room_since = self._clock()
        self._room = num_bytes

    def _room_for_job(self, pieces: list[Piece]) -> frozenset[int]:
        if not self._room:
            return frozenset()
        self.room_changed()
        if self._clock() - self._room_since < self.patience:
            return frozenset()
        drained = drained_for(pieces, self._room // self.arena.itemsize)
        # Who has left already stays away until there is enough.
        return drained | {p.slot for p in pieces if drained and p.state is PieceState.IDLE}

    def _demands(self, before: float) -> list[Demand]:
        """Who began to wait before a time, oldest first."""
        now = self._clock()
        absent = [v for v in self._waiting.absent()[:MOST_DEMANDS] if self._waiting.since(v) < before]
        ages = [now - self._waiting.since(v) for v in absent]
        waiter = self._idle_waiter()
        if waiter is not None:
            ages.append(now - self._waiting.since(waiter))
        if self._room:
            ages.append(now - self._room_since)
        self._next_aged = now + min((self.patience - age for age in ages if age < self.patience), default=math.inf)
        return [
            Demand(id(v), v.num_bytes // self.arena.itemsize, age >= self.patience)
            for v, age in zip(absent, ages, strict=False)
        ]

    @property
    def _reserve(self) -> int:
        return self.reserved_bytes() // self.arena.itemsize

    def _claimed_runs(self) -> tuple[Run, ...]:
        return tuple(Run(c.start, c.stop - c.start) for c in self._claims)

    def _grant_all(self, version: AdapterVersion) -> None:
        for hold in self._waiting.take(version):
            self._grant(hold)

    def _fail_all(self, version: AdapterVersion, error: LoquetierError) -> None:
        for hold in self._waiting.take(version):
            hold.state = HoldState.NEW
            hold.fail(error)

    # --- in and out ---

    def _place(self, version: AdapterVersion, placement: Placement) -> None:
        by_slot = self._map.by_slot()
        for slot in placement.evict:
            self._evict(by_slot[slot])
        slot = self.arena.allocate(version.modules, zeroed=False, at=placement.start)
        version.slot, version.is_ready = slot, False
        began, flat = self._clock(), self.host.get(version)
        if flat is not None:
            self.totals.host_hits += 1
            self._fill(version, flat, began)
            return
        self._map.loading.add(version)
        self.files.read(version, lambda result: self._arrived(version, slot, began, result))

    def _arrived(self, version: AdapterVersion, slot: int, began: float, result: Result[PackedAdapter]) -> None:
        self._map.loading.discard(version)
        self._news = True
        if version.slot != slot:
            return  # it was unloaded meanwhile, and its slot freed with it
        try:
            packed = result()
        except Exception as error:
            typed = error if isinstance(error, LoquetierError) else unavailable(version, error)
            log.warning("%s does not come in: %s", version.label, typed)
            self.totals.failures += 1
            self._take_out(version)
            self._fail_all(version, typed)
            return
        version.digest = version.digest or packed.digest
        self.host.put(version, packed.flat)
        self._fill(version, packed.flat, began)

    def _fill(self, version: AdapterVersion, flat: Tensor, began: float) -> None:
        """The one copy, between two steps."""
        self.arena.flat(version.slot).copy_(flat)
        self.arena.refresh(version.slot)
        version.is_ready = True
        seconds = self._clock() - began
        self.totals.loads += 1
        self.totals.load_seconds += seconds
        self.loaded(seconds)
        if version.slot not in self._draining:
            self._grant_all(version)

    def _evict(self, version: AdapterVersion) -> None:
        assert version.holders == 0, f"{version.label} is in use"
        self.totals.evictions += 1
        if version.source is None:
            self.registry.drop(version)  # kept, and in the way: as `keep_versions` says
        else:
            self._take_out(version)

    def _take_out(self, version: AdapterVersion) -> None:
        slot, version.slot, version.is_ready = version.slot, ABSENT_SLOT, True
        self.arena.free(slot)

    def _dropped(self, version: AdapterVersion) -> None:
        """Nobody means or uses it any more."""
        self._news = True
        self.host.drop(version)
        self.files.forget(version)
        self.forgotten(version)

    def _reclaim(self, size: int) -> bool:
        """Empty the best window of `size` elements for somebody who cannot wait; False when there is none."""
        pieces = self._map.pieces()
        window = best_window(pieces, size, PieceState.IDLE, self._claims) or best_window(
            pieces, size, PieceState.IDLE, ()
        )
        return self._evict_pieces(window or ())

    def reclaim_one(self) -> bool:
        """Give up the idle version that was used longest ago; False when there is none."""
        idle = [p for p in self._map.pieces() if p.state is PieceState.IDLE]
        return self._evict_pieces(sorted(idle, key=lambda p: p.last_used)[:1])

    def _evict_pieces(self, pieces: tuple[Piece, ...] | list[Piece]) -> bool:
        by_slot = self._map.by_slot()
        taken = [by_slot[p.slot] for p in pieces if p.state is PieceState.IDLE]
        for version in taken:
            self._evict(version)
        return bool(taken)

    @property
    def reclaimable_bytes(self) -> int:
        """Bytes of idle versions."""
        return sum(p.size for p in self._map.pieces() if p.state is PieceState.IDLE) * self.arena.itemsize

    def _check_possible(self, version: AdapterVersion) -> None:
        pieces = self._map.pieces()
        if is_possible(pieces, version.num_bytes // self.arena.itemsize, self._reserve):
            return
        fixed = sum(p.size for p in pieces if p.state is PieceState.FIXED) * self.arena.itemsize
        raise OutOfAdapterMemoryError(
            f"{version.label} needs {version.num_bytes} bytes of adapter memory; of {self.arena.total_bytes}, "
            f"{fixed} are taken by pinned adapters, jobs and versions that have no files, and "
            f"{self.reserved_bytes()} are kept for jobs to publish to. Unpin an adapter, wait for a job to end, or "
            "raise adapter_memory."
        )

    def _fail_impossible(self, waiting: list[AdapterVersion]) -> None:
        """Pins and jobs may have come since they began to wait."""
        for version in sorted(waiting, key=lambda v: v.num_bytes, reverse=True):
            try:
                self._check_possible(version)
            except OutOfAdapterMemoryError as error:
                self._fail_all(version, error)
            else:
                return  # what is smaller can be had too

    # --- books ---

    def close(self, error: LoquetierError) -> None:
        """Everybody who waits gets `error`."""
        for version in list(self._waiting):
            self._fail_all(version, error)

    def check_integrity(self) -> None:
        """Holds, waiters, loads and claims agree with the registry. Raises IntegrityError."""
        check_books(self.registry.versions, self._waiting.counts(), self._map.loading, self._num_holds)
        if self._claims and not (self._waiting or self.has_news):
            raise IntegrityError(f"residency: nobody waits, and {self._claims} are claimed")
