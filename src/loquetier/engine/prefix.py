"""KV pages that several sequences read, and pages kept for whoever comes with the same beginning. No torch.

Only full pages whose every token is computed are shared, so a shared page is never written again and nothing is copied.
A page's key is a hash chained over all tokens up to its end; the chain begins with who may share (`CacheSpace`) and the
adapter version, because K and V of a token depend on every token before it and on the weights that computed them.

Pages that nobody reads any more stay, and are given up, least recently used first, when a sequence needs room: they
count as free.
"""

from __future__ import annotations

import json
import os
from array import array
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b

from loquetier.engine.blocks import BlockAllocator
from loquetier.engine.policy import admission_order
from loquetier.engine.rows import Sequence
from loquetier.errors import IntegrityError, OutOfKVMemoryError


@dataclass(frozen=True, slots=True)
class CacheSpace:
    """Requests share pages inside one space only: how long an answer takes must not tell what others have asked."""

    owner: str = ""
    """Whose requests; every owner has a cache of its own, also on the base."""
    salt: str = ""
    """vLLM's `cache_salt`: divides an owner's requests further."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """What a waiting sequence would find."""

    pages: tuple[int, ...] = ()
    """Pages of its first tokens, in order; all full."""
    num_idle: int = 0
    """How many of them nobody reads now: they count as free until they are taken."""
    is_awaited: bool = False
    """A sequence before it computes the next page just now: waiting for that is cheaper than computing it twice."""


class PrefixCache:
    """Owner of every page in use or kept. Hands pages out, counts who reads them, and remembers what is in them.

    Args:
        allocator: the free list; nobody else takes from it.
        enabled: False: no page is shared or kept, the same bookkeeping otherwise.
        secret: key of the hashes, so that nobody can make two texts collide; a random one if None.
    """

    def __init__(self, allocator: BlockAllocator, enabled: bool = True, secret: bytes | None = None) -> None:
        self._allocator, self._enabled = allocator, enabled
        self._secret = os.urandom(32) if secret is None else secret
        self._readers = [0] * (allocator.num_pages + 1)
        """Sequences that hold each page."""
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Pages with a key and no reader; the first one is given up first."""
        self._computing: dict[bytes, Sequence] = {}
        """Keys of pages that a running sequence's prefill is still to fill."""
        self.num_queried = 0
        """Tokens of sequences that looked for their beginning, since the engine began; once per sequence."""
        self.num_hit = 0
        """Tokens of them that were found."""

    # --- keys ---

    def root(self, version: str, space: CacheSpace) -> bytes | None:
        """Where the chain of a sequence's keys begins; None when nothing is shared.

        Args:
            version: names one immutable set of weights for as long as the process lives: ``name@number``.
        """
        if not self._enabled:
            return None
        return self._hash(json.dumps([version, space.owner, space.salt]).encode())

    def _hash(self, data: bytes) -> bytes:
        return blake2b(data, key=self._secret, digest_size=32).digest()

    def _keys(self, seq: Sequence) -> list[bytes]:
        """Keys of the sequence's full pages; they are made once, tokens are only ever appended."""
        size, keys = self._allocator.page_size, seq.page_keys
        assert seq.cache_root is not None
        for start in range(len(keys) * size, len(seq.tokens) - size + 1, size):
            parent = keys[-1] if keys else seq.cache_root
            keys.append(self._hash(parent + array("q", seq.tokens[start : start + size]).tobytes()))
        return keys

    # --- finding ---

    def look_up(self, seq: Sequence) -> Prefix:
        """The longest kept beginning of `seq`. Changes nothing.

        The last token is never part of it: its row gives the logits. Nor is anything for a sequence that needs the
        logits of all its prompt's rows. It waits for pages of sequences before it only: those are served first anyway.
        """
        if seq.cache_root is None or seq.needs_prompt_logits:
            return Prefix()
        keys, most = self._keys(seq), (len(seq.tokens) - 1) // self._allocator.page_size
        pages: list[int] = []
        for key in keys[:most]:
            page = self._page_of.get(key)
            if page is None:
                leader = self._computing.get(key)
                awaited = leader is not None and admission_order(leader) < admission_order(seq)
                return Prefix(tuple(pages), self._count_idle(pages), awaited)
            pages.append(page)
        return Prefix(tuple(pages), self._count_idle(pages))

    def _count_idle(self, pages: list[int]) -> int:
        return sum(self._readers[page] == 0 for page in pages)

    def take(self, seq: Sequence, prefix: Prefix) -> None:
        """Let a sequence without pages begin with what `look_up` found just now."""
        for page in prefix.pages:
            self._readers[page] += 1
            self._idle.pop(page, None)
        seq.pages.extend(prefix.pages)
        seq.num_computed = len(prefix.pages) * self._allocator.page_size
        seq.num_offered = len(prefix.pages)
        if seq.cache_root is None:
            return
        for key in self._keys(seq)[len(prefix.pages) :]:
            self._computing.setdefault(key, seq)
        if seq.num_cached is None:
            seq.num_cached = seq.num_computed
            self.num_queried += len(seq.tokens)
            self.num_hit += seq.num_computed

    def offer(self, seq: Sequence) -> None:
        """Let others find the pages that are full by now: `num_computed` has grown, or a token has become known."""
        size = self._allocator.page_size
        filled = range(seq.num_offered, min(seq.num_computed, len(seq.tokens)) // size)
        if seq.cache_root is None or not filled:
            return
        keys, seq.num_offered = self._keys(seq), filled.stop
        for i in filled:
            self._stop_computing(keys[i], seq)
            page = seq.pages[i]
            # Two sequences may have computed the same page at once: the first one's is kept, both are right.
            if keys[i] not in self._page_of:
                self._page_of[keys[i]], self._key_of[page] = page, keys[i]

    def _stop_computing(self, key: bytes, seq: Sequence) -> None:
        if self._computing.get(key) is seq:
            del self._computing[key]

    # --- pages ---

    @property
    def num_available(self) -> int:
        """Pages that `grow` can hand out now: the free ones and those kept for nobody in particular."""
        return self._allocator.num_free + len(self._idle)

    @property
    def num_kept(self) -> int:
        """Pages whose content is known, in use or not."""
        return len(self._key_of)

    def grow(self, seq: Sequence, num_tokens: int) -> None:
        """Give a sequence the pages that it lacks for so many tokens, all or none.

        Raises:
            OutOfKVMemoryError: fewer are available; nothing was given up for it.
        """
        missing = self._allocator.pages_needed(num_tokens) - len(seq.pages)
        if missing <= 0:
            return
        if missing > self.num_available:
            raise OutOfKVMemoryError(
                f"{missing} KV pages asked for, {self.num_available} of {self._allocator.num_pages} are available: "
                "finish or preempt a sequence first, or raise kv_memory"
            )
        while self._allocator.num_free < missing:
            self._give_up(next(iter(self._idle)))
        for page in self._allocator.allocate(missing):
            self._readers[page] = 1
            seq.pages.append(page)

    def release(self, seq: Sequence) -> None:
        """Take a sequence's pages back; those whose content is known stay as long as there is room."""
        unknown: list[int] = []
        # The last page first: it is given up before those that it cannot be found without.
        for page in reversed(seq.pages):
            self._readers[page] -= 1
            if self._readers[page] == 0:
                if page in self._key_of:
                    self._idle[page] = None
                else:
                    unknown.append(page)
        self._allocator.free(reversed(unknown))
        seq.pages.clear()
        seq.num_offered = 0
        for key in seq.page_keys:
            self._stop_computing(key, seq)

    def distrust(self, seq: Sequence) -> None:
        """Nobody shall find the pages of this sequence any more: it failed, and they may be why.

        By key: with async scheduling it may have ended, or was preempted, before its failure is known, and owns none.
        """
        for page in [self._page_of[key] for key in seq.page_keys if key in self._page_of]:
            if page in self._idle:
                self._give_up(page)
            else:
                self._forget(page)

    def _give_up(self, page: int) -> None:
        del self._idle[page]
        self._forget(page)
        self._allocator.free([page])

    def _forget(self, page: int) -> None:
        del self._page_of[self._key_of.pop(page)]

    def check_integrity(self, running: Iterable[Sequence]) -> None:
        """Readers, keys and pages add up. Raises IntegrityError."""
        readers = [0] * len(self._readers)
        running = tuple(running)
        for seq in running:
            if len(set(seq.pages)) != len(seq.pages):
                raise IntegrityError(f"sequence {seq.seq_id} holds a page twice: {seq.pages}")
            for page in seq.pages:
                readers[page] += 1
        if readers != self._readers:
            wrong = [page for page, n in enumerate(readers) if n != self._readers[page]]
            raise IntegrityError(f"KV pages {wrong[:8]} have other readers than are counted")
        idle = {page for page in self._key_of if not readers[page]}
        if idle != self._idle.keys() or {p: k for k, p in self._page_of.items()} != self._key_of:
            raise IntegrityError(f"{len(idle)} kept KV pages without a reader, {len(self._idle)} are listed")
        if not {seq.seq_id for seq in self._computing.values()} <= {seq.seq_id for seq in running}:
            raise IntegrityError("a page is awaited from a sequence that does not run")
        in_use = [page for page, n in enumerate(readers) if n]
        self._allocator.check_integrity([in_use, self._idle])
