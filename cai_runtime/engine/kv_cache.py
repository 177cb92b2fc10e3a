"""Who owns which page of the paged KV cache: reference counts, prefix reuse, least-recently-used eviction.

Page-granular prefix reuse as in vLLM (Kwon et al. 2023, "PagedAttention"): a full page is named by a 128-bit digest of
its tokens and of its predecessor's digest, so equal digests mean equal prefixes. Only full pages are shared and a full
page is never written again, so nothing is ever copied.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence


def extend_digests(digests: list[bytes], token_ids: Sequence[int], page_size: int) -> None:
    """Append the digests of the full pages of `token_ids` that `digests` does not name yet.

    A digest is BLAKE2b-128 over the predecessor's digest and the page's tokens: a collision needs about 2^64 pages, so
    the tokens themselves need not be kept and compared.
    """
    for page in range(len(digests), len(token_ids) // page_size):
        tokens = array("q", token_ids[page * page_size : (page + 1) * page_size]).tobytes()
        parent = digests[-1] if digests else b""
        digests.append(hashlib.blake2b(parent + tokens, digest_size=16).digest())


class KVCache:
    """The page table of the whole cache. Bookkeeping only: the tensors are the runner's.

    Every page is in exactly one state: *free* (holds nothing), *cached* (holds a registered prefix that no sequence
    uses; may be evicted) or *used* (referenced by one sequence or more).
    """

    def __init__(self, num_pages: int, page_size: int, *, prefix_cache: bool = True):
        self.num_pages = num_pages
        self.page_size = page_size
        self.prefix_cache = prefix_cache
        self._free = list(range(num_pages - 1, -1, -1))
        self._references = [0] * num_pages
        self._digest_of: list[bytes | None] = [None] * num_pages  # of registered pages
        self._page_of: dict[bytes, int] = {}
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

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` positions."""
        return -(-num_tokens // self.page_size)

    def find_prefix(self, digests: Sequence[bytes]) -> list[int]:
        """The pages of the longest registered prefix of `digests`. Takes no reference."""
        pages = []
        for digest in digests:
            page = self._page_of.get(digest)
            if page is None:
                break
            pages.append(page)
        return pages

    def num_unused(self, pages: Iterable[int]) -> int:
        """How many of `pages` count as available now and would not once `share` has taken them."""
        return sum(page in self._unused for page in pages)

    def share(self, pages: Iterable[int]) -> None:
        """Take one more reference to each of these registered pages."""
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
        return pages

    def _evict(self) -> int:
        page, _ = self._unused.popitem(last=False)
        digest = self._digest_of[page]
        assert digest is not None
        del self._page_of[digest]
        self._digest_of[page] = None
        return page

    def register(self, page: int, digest: bytes) -> None:
        """Offer a full, computed page to later sequences. Does nothing when another page holds the same prefix."""
        if self.prefix_cache and digest not in self._page_of:
            self._page_of[digest] = page
            self._digest_of[page] = digest

    def release(self, pages: Sequence[int]) -> None:
        """Drop one reference to each page of a sequence. The end of a prefix is evicted before its beginning."""
        for page in reversed(pages):
            self._references[page] -= 1
            if self._references[page] == 0:
                if self._digest_of[page] is None:
                    self._free.append(page)
                else:
                    self._unused[page] = None

    def check_integrity(self, owners: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless every page is in exactly one state and its count is that of `owners`, the page
        lists of all sequences."""
        expected = Counter(page for pages in owners for page in pages)
        free, unused = Counter(self._free), set(self._unused)
        for page in range(self.num_pages):
            references, digest = self._references[page], self._digest_of[page]
            states = free[page] + (page in unused) + (references > 0)
            problem = (
                f"is in {states} states"
                if states != 1
                else f"has {references} references but {expected[page]} owners"
                if references != expected[page]
                else "is cached but not registered"
                if page in unused and digest is None
                else "is free but registered"
                if free[page] and digest is not None
                else "is registered under a digest that names another page"
                if digest is not None and self._page_of.get(digest) != page
                else None
            )
            if problem:
                raise AssertionError(f"KV cache page {page} {problem}")
        registered = sum(digest is not None for digest in self._digest_of)
        if len(self._page_of) != registered or set(expected) - set(range(self.num_pages)):
            raise AssertionError(f"{len(self._page_of)} digests for {registered} registered pages")
