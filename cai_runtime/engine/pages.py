"""Who owns which page of one pool: reference counts, reuse by name, least-recently-used eviction.

Page-granular prefix reuse as in vLLM (Kwon et al. 2023, "PagedAttention"): a full page is named by a 128-bit digest of
its tokens and of its predecessor's digest, so equal digests mean equal prefixes. A page that has a name is never written
again, so sharing copies nothing.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from cai_runtime.engine.segments import PlacedRows

Name = tuple[str, bytes]  # cache group and digest


def extend_digests(
    digests: list[bytes],
    token_ids: Sequence[int],
    page_size: int,
    *,
    salt: bytes = b"",
    given: Sequence[PlacedRows] = (),
) -> None:
    """Append the digests of the full pages of `token_ids` that `digests` does not name yet.

    A digest is BLAKE2b-128 over the predecessor's digest, the page's tokens and the digests of given rows among them: a
    collision needs about 2^64 pages, so the tokens themselves need not be kept and compared. salt: takes the place of the
    first page's predecessor; what else determines the content of every page.
    """
    for page in range(len(digests), len(token_ids) // page_size):
        start, end = page * page_size, (page + 1) * page_size
        content = hashlib.blake2b(digests[-1] if digests else salt, digest_size=16)
        content.update(array("q", token_ids[start:end]).tobytes())
        for rows in given:
            if rows.start < end and rows.end > start:
                content.update(array("q", [rows.start - start, len(rows.digest)]).tobytes() + rows.digest)
        digests.append(content.digest())


class PageBook:
    """The pages of one pool. Bookkeeping only: the tensors are the runner's.

    Every page is in exactly one state: *free* (holds nothing), *cached* (has a name and no user; may be evicted) or
    *used* (referenced once or more).

    lean: no more pages are cached than were ever used at once, and pages that were written before are handed out first:
    memory that the system commits page by page then grows to twice what was used at once, rather than to the whole pool.
    """

    def __init__(self, num_pages: int, *, lean: bool = False):
        self.num_pages = num_pages
        self._lean, self._most_used = lean, 0
        self._free = list(range(num_pages - 1, -1, -1))
        self._references = [0] * num_pages
        self._name_of: list[Name | None] = [None] * num_pages  # of registered pages
        self._page_of: dict[Name, int] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()  # cached pages, least recently used first

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._unused)

    @property
    def num_used(self) -> int:
        return self.num_pages - self.num_available

    @property
    def num_available(self) -> int:
        """Pages that `allocate` could hand out."""
        return len(self._free) + len(self._unused)

    def find(self, name: Name) -> int | None:
        """The page of that name. Takes no reference."""
        return self._page_of.get(name)

    def num_unused(self, pages: Iterable[int]) -> int:
        """How many of `pages` count as available now and would not once `share` has taken them."""
        return sum(page in self._unused for page in pages)

    def share(self, pages: Iterable[int]) -> None:
        """Take one more reference to each of these pages, which are registered or used."""
        for page in pages:
            self._unused.pop(page, None)
            self._references[page] += 1

    def allocate(self, count: int) -> list[int]:
        """`count` pages with one reference each, evicting cached pages when none is free. The caller has checked
        `num_available`."""
        if count > self.num_available:
            raise AssertionError(f"{count} pages asked for, {self.num_available} available")
        pages = []
        for _ in range(count):
            page = self._free.pop() if self._free else self._evict()
            self._references[page] = 1
            pages.append(page)
        self._most_used = max(self._most_used, self.num_used)
        return pages

    def _evict(self) -> int:
        page, _ = self._unused.popitem(last=False)
        name = self._name_of[page]
        assert name is not None
        del self._page_of[name]
        self._name_of[page] = None
        return page

    def register(self, page: int, name: Name) -> None:
        """Offer a computed page, which is never written again, to later sequences. Another page that has the name already
        keeps it while somebody holds it. A cached one gives way: it has the same content, but would be evicted as if the
        name had not been used since."""
        known = self._page_of.get(name)
        if known is not None and known in self._unused and self._name_of[page] is None:
            del self._unused[known], self._page_of[name]
            self._name_of[known] = None
            self._free.append(known)
        if name not in self._page_of and self._name_of[page] is None:
            self._page_of[name] = page
            self._name_of[page] = name

    def is_private(self, page: int) -> bool:
        """Whether its one user may write it."""
        return self._references[page] == 1 and self._name_of[page] is None

    def release(self, pages: Sequence[int]) -> None:
        """Drop one reference to each page of a sequence. The end of a prefix is evicted before its beginning."""
        for page in reversed(pages):
            self._references[page] -= 1
            if self._references[page] == 0:
                if self._name_of[page] is None:
                    self._free.append(page)
                else:
                    self._unused[page] = None
        while self._lean and len(self._unused) > self._most_used:
            self._free.append(self._evict())

    def check_integrity(self, owners: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless every page is in exactly one state and its count is that of `owners`, the page
        lists of all sequences."""
        expected = Counter(page for pages in owners for page in pages)
        free, unused = Counter(self._free), set(self._unused)
        for page in range(self.num_pages):
            references, name = self._references[page], self._name_of[page]
            states = free[page] + (page in unused) + (references > 0)
            problem = (
                f"is in {states} states"
                if states != 1
                else f"has {references} references but {expected[page]} owners"
                if references != expected[page]
                else "is cached but not registered"
                if page in unused and name is None
                else "is free but registered"
                if free[page] and name is not None
                else "is registered under a name that is another page's"
                if name is not None and self._page_of.get(name) != page
                else None
            )
            if problem:
                raise AssertionError(f"KV cache page {page} {problem}")
        registered = sum(name is not None for name in self._name_of)
        if len(self._page_of) != registered or set(expected) - set(range(self.num_pages)):
            raise AssertionError(f"{len(self._page_of)} names for {registered} registered pages")
