import random

import pytest

from cai_runtime.engine.kv_cache import KVCache, extend_digests


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
    pages = cache.allocate(cache.pages_for(len(tokens)))
    for page, name in zip(pages, digests(tokens, cache.page_size), strict=False):
        cache.register(page, name)
    return pages


def test_released_pages_are_found_again():
    cache = KVCache(8, 4)
    pages = fill(cache, list(range(10)))
    cache.release(pages)
    assert (cache.num_free, cache.num_cached, cache.num_used) == (6, 2, 0)
    found = cache.find_prefix(digests(list(range(12))))
    assert found == pages[:2]
    cache.share(found)
    cache.share(found)
    cache.check_integrity([found, found])
    cache.release(found)
    cache.check_integrity([found])
    assert cache.num_used == 2


def test_least_recently_used_is_evicted_and_ends_go_before_beginnings():
    cache = KVCache(4, 4)
    old, new = fill(cache, [1] * 8), fill(cache, [2] * 8)
    cache.release(old)
    cache.release(new)
    cache.allocate(1)
    assert cache.find_prefix(digests([1] * 8)) == old[:1]
    assert cache.find_prefix(digests([2] * 8)) == new
    cache.allocate(1)
    assert cache.find_prefix(digests([1] * 8)) == []


def test_same_prefix_twice_is_registered_once():
    cache = KVCache(8, 4)
    first, second = fill(cache, [1] * 4), fill(cache, [1] * 4)
    cache.release(second)
    assert cache.num_cached == 0 and cache.num_free == 7
    cache.release(first)
    cache.check_integrity([])
    assert cache.num_cached == 1


def test_without_prefix_cache_nothing_is_kept():
    cache = KVCache(8, 4, prefix_cache=False)
    cache.release(fill(cache, [1] * 16))
    assert cache.num_free == 8


@pytest.mark.parametrize("damage", ["leak", "double", "stolen", "unregistered"])
def test_check_integrity_notices(damage):
    cache = KVCache(8, 4)
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
        cache._digest_of[pages[0]] = None
    with pytest.raises(AssertionError, match="KV cache page"):
        cache.check_integrity(owners)


def test_random_use_keeps_integrity():
    rng = random.Random(0)
    cache = KVCache(24, 4)
    owners = []
    for _ in range(3000):
        if owners and rng.random() < 0.5:
            cache.release(owners.pop(rng.randrange(len(owners))))
        else:
            tokens = [rng.randrange(2) for _ in range(rng.randrange(1, 30))]
            names = digests(tokens)
            prefix = cache.find_prefix(names[: (len(tokens) - 1) // 4])
            needed = cache.pages_for(len(tokens)) - len(prefix)
            if needed > cache.num_available - cache.num_unused(prefix):
                continue
            cache.share(prefix)
            pages = prefix + cache.allocate(needed)
            for page, name in zip(pages, names, strict=False):
                cache.register(page, name)
            owners.append(pages)
        cache.check_integrity(owners)
    for pages in owners:
        cache.release(pages)
    cache.check_integrity([])
    assert cache.num_used == 0
