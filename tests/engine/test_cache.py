"""Groups and their manager, without an engine."""

import pytest

from cai_runtime.engine.cache import CacheManager
from cai_runtime.engine.cache_groups import bytes_held, positions_held, split_budget
from cai_runtime.engine.cache_layouts import PageCopy
from cai_runtime.engine.segments import Prompt
from cai_runtime.engine.sequence import Sequence
from cai_runtime.kernels.cache_groups import CacheGroup, pools

FULL = CacheGroup("full", page_bytes=100, page_size=4)
WINDOW = CacheGroup("window", "window", 100, 4, window=6)
STATE = CacheGroup("state", "state", 300, 4, reuse="snapshot", align=8)


def sequence(token_ids):
    return Sequence(0, None, Prompt(list(token_ids)), None, None, None)


def admitted(manager, made):
    found = manager.find(made)
    made.num_computed = manager.admit(made, found, budget=99, spare=0).start
    return made


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"page_size": 0}, "page_size"),
        ({"kind": "window"}, "window"),
        ({"window": 4}, "window"),
        ({"kind": "window", "window": 0}, "window"),
        ({"reuse": "content"}, "reuse"),
        ({"align": 6}, "align"),
        ({"kind": "state", "reuse": "snapshot"}, "align"),
        ({"kind": "encoder", "reuse": "content"}, "most_pages"),
    ],
)
def test_groups_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CacheGroup("g", **{"page_size": 4, **options})


def test_groups_of_equal_pages_share_a_pool():
    other = CacheGroup("other", page_bytes=50, page_size=4)
    assert pools([FULL, WINDOW, STATE, other]) == [[FULL, WINDOW], [STATE], [other]]
    with pytest.raises(ValueError, match="share a pool"):
        CacheManager([FULL, WINDOW], {"full": 3, "window": 4})
    with pytest.raises(ValueError, match="different sizes"):
        CacheManager([FULL, CacheGroup("b", page_size=8)], {"full": 3, "b": 4})


@pytest.mark.parametrize("groups", [(FULL,), (FULL, WINDOW), (FULL, STATE), (FULL, WINDOW, STATE)])
def test_a_budget_is_split_by_what_a_sequence_needs(groups):
    counts = split_budget(groups, budget=20_000, positions=64)
    assert 0.9 * 20_000 < bytes_held(groups, counts) <= 20_000
    assert positions_held(groups, counts)[0] >= 64
    assert positions_held(groups, split_budget(groups, budget=3000, positions=64))[0] >= 16


@pytest.mark.parametrize("groups", [(FULL,), (FULL, WINDOW), (FULL, STATE), (STATE,)])
def test_a_fork_shares_what_is_full_and_copies_the_rest(groups):
    manager = CacheManager(groups, {"full": 20, "window": 20, "state": 8})
    parent, child = admitted(manager, sequence(range(10))), sequence(range(10))
    parent.num_computed += manager.advance(parent, 10, 10)
    manager.commit(parent)
    copies = manager.fork(parent, child)
    names = [group.name for group in groups if group.kind != "state"]
    assert [copy.group for copy in copies] == names and child.num_computed == 10
    manager.check_integrity([parent, child])
    for copy in copies:
        assert isinstance(copy, PageCopy) and copy.source != copy.target
    for made in (parent, child, parent):
        made.token_ids.append(1)
        assert manager.grow(made, len(made.token_ids))
        made.num_computed += manager.advance(made, 1, 1)
        manager.commit(made)
        manager.check_integrity([parent, child])
    manager.release(parent)
    manager.check_integrity([child])
    manager.release(child)
    manager.check_integrity([])
    assert manager.num_used == 0


def test_a_fork_without_pages_changes_nothing():
    manager = CacheManager([FULL], {"full": 3})
    parent, child = admitted(manager, sequence(range(10))), sequence(range(10))
    parent.num_computed += manager.advance(parent, 10, 10)
    assert manager.fork(parent, child) is None and not child.held
    manager.check_integrity([parent])


@pytest.mark.parametrize(("groups", "computed"), [((FULL,), 3), ((FULL, WINDOW), 3), ((FULL, STATE), 0)])
def test_a_state_is_not_taken_back_in_part(groups, computed):
    manager = CacheManager(groups, {"full": 9, "window": 9, "state": 4})
    made = admitted(manager, sequence(range(5)))
    assert manager.advance(made, fed=5, kept=3) == computed
    manager.check_integrity([made])
