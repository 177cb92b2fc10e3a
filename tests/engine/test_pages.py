import random

import pytest

from cai_runtime.engine.pages import PageBook, extend_digests
from cai_runtime.engine.segments import PlacedRows


def digests(tokens, page_size=4):
    names = []
    extend_digests(names, tokens, page_size)
    return names


def test_digest_names_the_whole_prefix():
    a, b = digests([1, 2, 3, 4, 5, 6, 7, 8, 9]), digests([9, 2, 3, 4, 5, 6, 7, 8])
    assert len(a) == 2 and len(b) == 2
    assert a[0] != b[0] and a[1] != b[1], "equal second pages after different first ones are different prefixes"
    assert digests([1, 2, 3, 4, 5, 6, 7, 8]) == a


def test_digests_grow_as_tokens_do():
    names = digests([1, 2, 3, 4, 5])
    extend_digests(names, list(range(1, 9)), 4)
    assert names == digests(list(range(1, 9)))


def fill(cache, tokens):
    """Compute and register the pages of a sequence."""
    pages = cache.allocate(-(-len(tokens) // 4))
    for page, digest in zip(pages, digests(tokens), strict=False):
        cache.register(page, ("full", digest))
    return pages


def found(cache, names):
    """The pages of the longest registered prefix."""
    pages = [cache.find(("full", digest)) for digest in names]
    return pages[: pages.index(None)] if None in pages else pages


def test_released_pages_are_found_again():
    cache = PageBook(8)
    pages = fill(cache, list(range(10)))
    cache.release(pages)
    assert (cache.num_free, cache.num_cached, cache.num_used) == (6, 2, 0)
    shared = found(cache, digests(list(range(12))))
    assert shared == pages[:2]
    cache.share(shared)
    cache.share(shared)
    cache.check_integrity([shared, shared])
    cache.release(shared)
    cache.check_integrity([shared])
    assert cache.num_used == 2


def test_least_recently_used_is_evicted_and_ends_go_before_beginnings():
    cache = PageBook(4)
    old, new = fill(cache, [1] * 8), fill(cache, [2] * 8)
    cache.release(old)
    cache.release(new)
    cache.allocate(1)
    assert found(cache, digests([1] * 8)) == old[:1]
    assert found(cache, digests([2] * 8)) == new
    cache.allocate(1)
    assert found(cache, digests([1] * 8)) == []


def test_same_prefix_twice_is_registered_once():
    cache = PageBook(8)
    first, second = fill(cache, [1] * 4), fill(cache, [1] * 4)
    cache.release(second)
    assert cache.num_cached == 0 and cache.num_free == 7
    cache.release(first)
    cache.check_integrity([])
    assert cache.num_cached == 1


def test_salt_and_given_rows_are_part_of_the_name():
    def named(**more):
        names = []
        extend_digests(names, [1, 2, 3, -2, -2, 6, 7, 8], 4, **more)
        return names

    rows = [named(given=[PlacedRows(3, [0, 0], digest)]) for digest in (b"cat", b"dog")]
    assert len({tuple(names) for names in [named(), named(salt=b"a"), named(salt=b"b"), *rows]}) == 5
    shifted = named(given=[PlacedRows(2, [0, 0], b"cat")])
    assert shifted[0] != rows[0][0], "the same rows one position earlier"
    assert named(given=[PlacedRows(4, [0], b"cat")])[0] == named()[0], "rows behind a page are not in its name"


def test_a_name_that_is_computed_again_counts_as_used():
    """Such as a state's, whose prefix was lost. Else it is evicted before what nobody has asked for since."""
    cache = PageBook(4)
    for name in "ab":
        (page,) = cache.allocate(1)
        cache.register(page, name)
        cache.release([page])
    (again,) = cache.allocate(1)
    cache.register(again, "a")
    assert cache.find("a") == again and cache.num_free == 2
    cache.check_integrity([[again]])
    cache.release([again])
    cache.allocate(3)
    assert cache.find("a") == again and cache.find("b") is None


@pytest.mark.parametrize("damage", ["leak", "double", "stolen", "unregistered"])
def test_check_integrity_notices(damage):
    cache = PageBook(8)
    pages = fill(cache, [1] * 8)
    owners = [pages]
    cache.check_integrity(owners)
    if damage == "leak":
        owners = []
    elif damage == "double":
        cache._free.append(pages[0])
    elif damage == "stolen":
        owners = [pages, pages[:1]]
    else:
        cache.release(pages)
        owners = []
        cache._name_of[pages[0]] = None
    with pytest.raises(AssertionError, match="KV cache page"):
        cache.check_integrity(owners)


def test_random_use_keeps_integrity():
    rng = random.Random(0)
    cache = PageBook(24)
    owners = []
    for _ in range(3000):
        if owners and rng.random() < 0.5:
            cache.release(owners.pop(rng.randrange(len(owners))))
        else:
            tokens = [rng.randrange(2) for _ in range(rng.randrange(1, 30))]
            names = digests(tokens)
            prefix = found(cache, names[: (len(tokens) - 1) // 4])
            needed = -(-len(tokens) // 4) - len(prefix)
            if needed > cache.num_available - cache.num_unused(prefix):
                continue
            cache.share(prefix)
            pages = prefix + cache.allocate(needed)
            for page, name in zip(pages, names, strict=False):
                cache.register(page, ("full", name))
            owners.append(pages)
        cache.check_integrity(owners)
    for pages in owners:
        cache.release(pages)
    cache.check_integrity([])
    assert cache.num_used == 0


def test_a_lean_pool_keeps_no_more_than_was_used_at_once():
    cache = PageBook(100, lean=True)
    seen = set()
    for window in range(20):
        pages = cache.allocate(3)
        seen |= set(pages)
        for page in pages:
            cache.register(page, ("encoder", bytes([window, page])))
        cache.release(pages)
        cache.check_integrity([])
        assert cache.num_cached == 3 and all(cache.find(("encoder", bytes([window, page]))) == page for page in pages)
    assert len(seen) <= 6  # memory of the pool that was ever touched
    two = [cache.allocate(3), cache.allocate(3)]
    for pages in two:
        for page in pages:
            cache.register(page, ("encoder", bytes([99, page])))
        cache.release(pages)
    assert cache.num_cached == 6
