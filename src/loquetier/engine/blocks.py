"""Which KV page belongs to whom. Pure bookkeeping: it hands out page numbers and never touches memory.

Page ids are ``1 .. num_pages``. Page 0 is the *trash page*: padding rows write their K and V there, so the
cache tensor has ``num_pages + 1`` pages and page 0 is never handed out and never freed.
"""

from __future__ import annotations

from collections.abc import Iterable

from loquetier.errors import ConfigError, IntegrityError, OutOfKVMemoryError

TRASH_PAGE = 0
"""Where rows that belong to nobody write. Never handed out."""


class BlockAllocator:
    """Owner of the free list of KV pages.

    The free list is last in, first out: a page freed just now is the likeliest to be in the CPU's cache.

    Args:
        num_pages: pages that can be handed out (the trash page not counted), >= 1.
        page_size: tokens per page, >= 1.

    Raises:
        ConfigError: either number is below 1.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        for name, value in (("num_pages", num_pages), ("page_size", page_size)):
            if value < 1:
                raise ConfigError(f"{name}={value}: must be >= 1; raise kv_memory so that at least one page fits")
        self._num_pages = num_pages
        self._page_size = page_size
        self._free = list(range(num_pages, 0, -1))
        self._is_free = bytearray([0] + [1] * num_pages)

    @property
    def num_pages(self) -> int:
        """Pages that exist, free or not, without the trash page."""
        return self._num_pages

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return self._page_size

    @property
    def num_free(self) -> int:
        """Pages that `allocate` can hand out now."""
        return len(self._free)

    def pages_needed(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens of one sequence."""
        return -(-num_tokens // self._page_size)

    def allocate(self, n: int) -> list[int]:
        """Hand out `n` pages, all or none.

        Raises:
            OutOfKVMemoryError: fewer than `n` pages are free; nothing was taken.
        """
        if n < 0:
            raise IntegrityError(f"allocate({n}): cannot hand out a negative number of pages")
        if n > len(self._free):
            raise OutOfKVMemoryError(
                f"{n} KV pages asked for, {len(self._free)} of {self._num_pages} are free: "
                "free pages first (finish or preempt a sequence), or raise kv_memory"
            )
        pages = [self._free.pop() for _ in range(n)]
        for page in pages:
            self._is_free[page] = 0
        return pages

    def free(self, pages: Iterable[int]) -> None:
        """Take pages back, all or none.

        Raises:
            IntegrityError: a page is out of range, is free already, or is named twice; nothing was freed.
        """
        pages = list(pages)
        if len(set(pages)) != len(pages):
            raise IntegrityError(f"free({pages}): a page is named twice")
        for page in pages:
            if not 1 <= page <= self._num_pages:
                raise IntegrityError(f"free: page {page} is outside 1..{self._num_pages}")
            if self._is_free[page]:
                raise IntegrityError(f"free: page {page} is free already")
        for page in pages:
            self._is_free[page] = 1
        self._free.extend(reversed(pages))

    def check_integrity(self, owners: Iterable[Iterable[int]]) -> None:
        """Check that every page is either free or in exactly one of the page lists in `owners`.

        Raises:
            IntegrityError: a page is lost, owned twice, both free and owned, or does not exist.
        """
        holders = [0] * (self._num_pages + 1)
        for source in (self._free, *owners):
            for page in source:
                if not 1 <= page <= self._num_pages:
                    raise IntegrityError(f"page {page} is outside 1..{self._num_pages}")
                holders[page] += 1
        for page in range(1, self._num_pages + 1):
            if holders[page] != 1:
                raise IntegrityError(f"page {page} is held {holders[page]} times (free list and owners together)")
        marked_free = sum(self._is_free)
        if marked_free != len(self._free) or not all(self._is_free[p] for p in self._free):
            raise IntegrityError(f"{marked_free} pages are marked free, {len(self._free)} are in the free list")
