"""Groups and their manager, without an engine."""

import pytest

from cai_runtime.engine.cache import CacheManager
from cai_runtime.engine.cache_groups import bytes_held, bytes_wanted, positions_held, split_budget, useful_bytes
from cai_runtime.engine.cache_layouts import PageCopy
from cai_runtime.engine.request import Request
from cai_runtime.engine.segments import Prompt
from cai_runtime.engine.sequence import Sequence
from cai_runtime.kernels.cache_groups import CacheGroup, pools

FULL = CacheGroup("full", page_bytes=100, page_size=4)
WINDOW = CacheGroup("window", "window", 100, 4, window=6)
STATE = CacheGroup("state", "state", 300, 4, reuse="snapshot", align=8)


def sequence(token_ids):
    return Sequence(0, Request(), Prompt(list(token_ids)), None, None, None)


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


@pytest.mark.parametrize("budget", [60_000, 30_000, 12_000])
def test_a_window_gets_its_pages_whatever_the_budget(budget):
    """A window of 40 positions beside a context of 4,000: half the budget gives half the context, not half the window."""
    groups = CacheGroup("full", page_bytes=50, page_size=4), CacheGroup("window", "window", 100, 4, window=40)
    counts = split_budget(groups, budget, positions=4000, chunk=64)
    held, group = positions_held(groups, counts)
    assert bytes_held(groups, counts) <= budget and counts["window"] >= groups[1].needed(4000)
    assert min(4000, 0.8 * budget / 50 * 4 - 200) <= held and (group == "full" or held > 4000)


def test_a_useful_budget_holds_every_window_and_a_chunk():
    groups = CacheGroup("full", page_bytes=50, page_size=4), CacheGroup("window", "window", 100, 4, window=40)
    enough = useful_bytes(groups, 4000, sequences=3, chunk=64)
    assert split_budget(groups, enough, 4000, chunk=64) == {"full": 3000, "window": 3 * groups[1].needed(4000) + 16}
    assert useful_bytes((FULL,), 64, sequences=3, chunk=512) == 3 * 16 * 100, "full pages are of the prompt anyway"


def test_the_wanted_budget_is_above_the_one_that_is_too_small():
    groups = CacheGroup("full", page_bytes=100, page_size=4), CacheGroup("window", "window", 50, 4, window=6)
    for counts in ({"full": 9, "window": 900}, {"full": 9, "window": 9}, {"full": 0, "window": 2}):
        wanted = bytes_wanted(groups, counts, 128)
        assert wanted > bytes_held(groups, counts)
        assert positions_held(groups, split_budget(groups, wanted, 128))[0] >= 128


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
