"""Per-key limits: token buckets for requests and tokens, a count for concurrency. Event loop only; time is given."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from loquetier.server.auth import Principal
from loquetier.server.problems import ApiError, too_many

Clock = Callable[[], float]
"""Monotonic seconds."""


@dataclass(slots=True)
class TokenBucket:
    """`per_minute` units a minute, at most that many saved up. May be overdrawn by what is known only afterwards."""

    per_minute: float
    level: float
    at: float

    def refill(self, now: float) -> None:
        """Add what the time since the last call has brought."""
        self.level = min(self.per_minute, self.level + max(0.0, now - self.at) * self.per_minute / 60)
        self.at = now

    def wait_for(self, amount: float) -> float:
        """Seconds until `amount` (or a full bucket, if that is less) is there."""
        return max(0.0, min(amount, self.per_minute) - self.level) * 60 / self.per_minute


@dataclass(slots=True)
class Limiter:
    """What every key has used. Keys come from a file, so the books are bounded."""

    clock: Clock
    _buckets: dict[tuple[str, str], TokenBucket] = field(default_factory=dict)
    _running: dict[str, int] = field(default_factory=dict)

    def take_request(self, who: Principal) -> None:
        """Count one request. Raises ApiError 429."""
        self._take(who, "requests", who.requests_per_minute, 1)

    def take_tokens(self, who: Principal, prompt_tokens: int) -> None:
        """Count a prompt before it is computed. Raises ApiError 429."""
        self._take(who, "tokens", who.tokens_per_minute, prompt_tokens)

    def charge_tokens(self, who: Principal, tokens: int) -> None:
        """Count generated tokens; the bucket may go below zero, and later requests wait for it."""
        if who.tokens_per_minute is not None:
            self._bucket(who, "tokens", who.tokens_per_minute).level -= tokens

    def headers(self, who: Principal) -> dict[str, str]:
        """``x-ratelimit-*`` as OpenAI sends them, for the limits that this key has."""
        found: dict[str, str] = {}
        for what, limit in (("requests", who.requests_per_minute), ("tokens", who.tokens_per_minute)):
            if limit is not None:
                bucket = self._bucket(who, what, limit)
                found[f"x-ratelimit-limit-{what}"] = str(limit)
                found[f"x-ratelimit-remaining-{what}"] = str(max(0, int(bucket.level)))
                found[f"x-ratelimit-reset-{what}"] = f"{bucket.wait_for(limit):.3f}s"
        return found

    @contextmanager
    def running(self, who: Principal) -> Iterator[None]:
        """Hold one of the key's concurrent requests. Raises ApiError 429."""
        now = self._running.get(who.id, 0)
        if who.concurrency is not None and now >= who.concurrency:
            raise too_many(f"this key may have {who.concurrency} requests at once", 1, "concurrency_limit_exceeded")
        self._running[who.id] = now + 1
        try:
            yield
        finally:
            self._running[who.id] -= 1

    def _take(self, who: Principal, what: str, limit: int | None, amount: float) -> None:
        if limit is None:
            return
        bucket = self._bucket(who, what, limit)
        wait = bucket.wait_for(amount)
        if wait > 0:
            error = too_many(f"this key may use {limit} {what} per minute; try again in {wait:.1f} s", wait)
            error.headers.update(self.headers(who))
            raise error
        bucket.level -= amount

    def _bucket(self, who: Principal, what: str, limit: int) -> TokenBucket:
        now = self.clock()
        bucket = self._buckets.setdefault((who.id, what), TokenBucket(limit, limit, now))
        bucket.refill(now)
        return bucket


@dataclass(slots=True)
class BadKeys:
    """Refused keys per address; the least recent addresses are forgotten."""

    clock: Clock
    per_minute: int
    max_addresses: int = 1024
    _buckets: OrderedDict[str, TokenBucket] = field(default_factory=OrderedDict)

    def check(self, address: str) -> ApiError | None:
        """429 for an address that has tried too often, None for others."""
        bucket = self._buckets.get(address)
        if bucket is None:
            return None
        bucket.refill(self.clock())
        wait = bucket.wait_for(1)
        return too_many("too many requests with a bad API key", wait) if wait > 0 else None

    def count(self, address: str) -> None:
        """One more bad key from this address."""
        bucket = self._buckets.pop(address, None) or TokenBucket(self.per_minute, self.per_minute, self.clock())
        bucket.refill(self.clock())
        bucket.level -= 1
        self._buckets[address] = bucket
        while len(self._buckets) > self.max_addresses:
            self._buckets.popitem(last=False)
