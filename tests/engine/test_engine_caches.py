"""The engine's promises hold whatever caches a model declares: batch, chunks, reuse and preemption change no text."""

import random
import threading

import pytest

from cai_runtime.engine.request import Request, SamplingParams
from cai_runtime.engine.segments import EncoderInput, GivenRows
from cai_runtime.errors import CaiError, InvalidRequestError, NonFiniteLogitsError, RequestTooLargeError, RunnerError

COMBINATIONS = [("full",), ("window",), ("full", "window"), ("state",), ("full", "state"), ("full", "window", "state")]


@pytest.fixture(params=COMBINATIONS, ids="+".join)
def kinds(request):
    return request.param


@pytest.fixture(scope="module")
def mixed_prompts():
    """Prompts of which some begin alike."""
    rng = random.Random(3)
    beginnings = [[rng.randrange(90) for _ in range(n)] for n in (0, 9, 16, 33)]
    return [[*rng.choice(beginnings), *(rng.randrange(90) for _ in range(rng.randrange(1, 30)))] for _ in range(16)]


@pytest.mark.parametrize(
    ("batch", "chunk", "prefix_cache", "pages", "slots"),
    [(1, 64, False, 64, 12), (8, 64, True, 64, 24), (8, 5, True, 64, 24), (8, 1, False, 40, 12), (8, 11, True, 26, 9)],
)
def test_text_is_the_definitions(
    make_engine, make_groups, greedy, kinds, mixed_prompts, batch, chunk, prefix_cache, pages, slots
):
    runner = make_groups(kinds, num_pages=pages, slots=slots)
    engine = make_engine(runner, max_batch=batch, prefill_chunk=chunk, prefix_cache=prefix_cache)
    for _ in range(2):  # the second time much is found
        handles = [engine.submit(greedy(prompt, 14)) for prompt in mixed_prompts]
        for prompt, handle in zip(mixed_prompts, handles, strict=True):
            assert handle.result(timeout=60).token_ids == runner.defined(prompt, 14)
        engine.check_integrity()
    if (
        prefix_cache and pages == 64
    ):  # what a crowd leaves in a pool depends on who came when; what was served last is there
        longest = max(mixed_prompts, key=len)
        for _ in range(2):
            before = engine.stats().prefix_hit_tokens
            engine.submit(greedy(longest, 14)).result(timeout=60)
        assert engine.stats().prefix_hit_tokens > before


def test_separate_pools_give_the_same(make_engine, make_groups, greedy, mixed_prompts):
    runner = make_groups(("full", "window"), num_pages=20, shared=False)
    engine = make_engine(runner, max_batch=8, prefill_chunk=7)
    handles = [engine.submit(greedy(prompt, 14)) for prompt in mixed_prompts]
    for prompt, handle in zip(mixed_prompts, handles, strict=True):
        assert handle.result(timeout=60).token_ids == runner.defined(prompt, 14)
    assert engine.stats().preemptions > 0


def test_every_request_ends_under_the_tightest_budgets(make_engine, make_groups, greedy, kinds):
    for pages, slots, chunk in ((16, 2, 1), (11, 3, 64), (13, 4, 6)):
        runner = make_groups(kinds, num_pages=pages, slots=slots)
        engine = make_engine(runner, max_batch=6, prefill_chunk=chunk)
        rng, handles = random.Random(pages), []
        most = min(engine.max_context, 60)
        for _ in range(20):
            length = rng.randrange(1, most)
            prompt = [rng.randrange(2) for _ in range(length)]
            count = rng.randrange(1, min(most - length, 12) + 1)
            handles.append((prompt, count, engine.submit(greedy(prompt, count))))
        for prompt, count, handle in handles:
            assert handle.result(timeout=60).token_ids == runner.defined(prompt, count)
        engine.check_integrity()


def test_threads_with_aborts_and_failures(make_engine, make_groups, greedy, kinds):
    runner = make_groups(kinds, num_pages=30, slots=9)
    runner.fail_on, runner.nan_on = 95, 94
    engine = make_engine(runner, max_batch=6, prefill_chunk=11)
    wrong = []

    def worker(number):
        rng = random.Random(number)
        for _ in range(12):
            prompt = [rng.randrange(3)] * rng.choice([0, 8, 17]) + [
                rng.randrange(90) for _ in range(rng.randrange(1, 30))
            ]
            kind, count = rng.choice(["good", "good", "abort", "poison", "nan"]), rng.randrange(1, 15)
            last = {"poison": [95], "nan": [94]}.get(kind, [])
            handle = engine.submit(greedy([*prompt, *last], count))
            if kind == "abort":
                handle.abort()
                continue
            text = runner.defined(prompt, count)
            try:
                if handle.result(timeout=60).token_ids != text or last:
                    wrong.append((kind, prompt))
            except (RunnerError, NonFiniteLogitsError) as error:
                if not last and not {94, 95} & set(text[:-1]):
                    wrong.append((kind, prompt, error))

    threads = [threading.Thread(target=worker, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not wrong
    engine.check_integrity()


def test_a_failed_step_is_repeated_from_the_same_state(make_engine, make_groups, greedy, kinds, mixed_prompts):
    """The runner fails after it has written everything: what it read must still be there."""
    runner = make_groups(kinds)
    runner.fail_after = 1
    engine = make_engine(runner, max_batch=4)
    handles = [engine.submit(greedy(prompt, 8)) for prompt in mixed_prompts[:6]]
    for prompt, handle in zip(mixed_prompts, handles, strict=False):
        assert handle.result(timeout=60).token_ids == runner.defined(prompt, 8)
    assert engine.stats().retries > 0


class Drafts:
    """Proposes what comes, or something wrong from a random place on."""

    def __init__(self, runner):
        self.runner, self.rng = runner, random.Random(0)

    def propose(self, sequence):
        known = list(sequence.token_ids)
        draft = list(self.runner.defined(known, self.rng.randrange(5)))
        if draft and self.rng.random() < 0.5:
            draft[self.rng.randrange(len(draft))] = 1
        return draft


@pytest.mark.parametrize("pages", [24, 64])
def test_drafts_are_taken_back(make_engine, make_groups, greedy, kinds, mixed_prompts, pages):
    runner = make_groups(kinds, num_pages=pages)
    engine = make_engine(runner, max_batch=5, proposer=Drafts(runner))
    handles = [engine.submit(greedy(prompt, 16)) for prompt in mixed_prompts]
    for prompt, handle in zip(mixed_prompts, handles, strict=True):
        assert handle.result(timeout=60).token_ids == runner.defined(prompt, 16)
    engine.check_integrity()
    stats = engine.stats()
    assert 0 < stats.drafts_taken < stats.tokens_drafted


def test_a_window_holds_no_more_than_it_needs(make_engine, make_groups, greedy):
    """A context of 120 positions in 5 pages of 4, for a window of 6."""
    runner = make_groups(("window",), num_pages=5)
    engine = make_engine(runner, max_batch=1)
    prompt = [i % 90 for i in range(100)]
    assert engine.submit(greedy(prompt, 20)).result(timeout=60).token_ids == runner.defined(prompt, 20)
    assert engine.max_context == runner.max_context
    assert max(map(sum, runner.steps)) <= 20


def test_prefix_of_a_window_needs_its_end_alone(make_engine, make_groups, greedy):
    runner = make_groups(("window",), num_pages=6)
    engine = make_engine(runner, max_batch=1, prefill_chunk=8)
    prompt = [i % 90 for i in range(40)]
    for _ in range(2):
        done = engine.submit(greedy([*prompt, 7], 1)).result(timeout=60)
    assert done.cached_tokens == 40 and done.token_ids == runner.defined([*prompt, 7], 1)


def test_a_state_goes_on_at_a_snapshot(make_engine, make_groups, greedy):
    runner = make_groups(("state",), slots=6)
    engine = make_engine(runner, prefill_chunk=8)
    prompt = [i % 90 for i in range(21)]
    first = engine.submit(greedy(prompt, 6)).result(timeout=60)
    assert runner.steps[:3] == [[8], [8], [5]], "chunks end at multiples of align"
    again = engine.submit(greedy([*prompt, *first.token_ids], 6)).result(timeout=60)
    assert (first.cached_tokens, again.cached_tokens) == (0, 24), "a snapshot taken while decoding"
    assert again.token_ids == runner.defined([*prompt, *first.token_ids], 6)


def test_an_encoders_output_is_made_once(make_engine, make_groups):
    runner = make_groups(("full", "encoder"))
    engine = make_engine(runner, max_batch=8)
    hears = [(EncoderInput(f, 9, str(f).encode()), f) for f in (1234, 777)]
    prompt = list(range(11))
    sampling = SamplingParams(max_tokens=9, temperature=0.0)
    for _ in range(2):
        handles = [
            (f, engine.submit(Request(segments=(audio, prompt), sampling=sampling)))
            for audio, f in hears
            for _ in range(3)
        ]
        for features, handle in handles:
            assert handle.result(timeout=60).token_ids == runner.defined(prompt, 9, features)
    assert runner.encoded == [b"1234", b"777"]


def test_other_audio_waits_for_pages_and_evicts(make_engine, make_groups):
    runner = make_groups(("full", "encoder"), encoder_pages=6)
    engine = make_engine(runner, max_batch=8, prefix_cache=True)
    sampling = SamplingParams(max_tokens=5, temperature=0.0)
    handles = [
        engine.submit(Request(segments=(EncoderInput(f, 12, str(f).encode()), [1, 2, 3, 4, 5]), sampling=sampling))
        for f in range(100, 110)
    ]
    for features, handle in enumerate(handles, 100):
        assert handle.result(timeout=60).token_ids == runner.defined([1, 2, 3, 4, 5], 5, features)
    engine.check_integrity()


@pytest.mark.parametrize("chunk", [2, 64])
def test_other_pictures_never_hit_each_other(make_engine, make_groups, kinds, chunk):
    runner = make_groups(kinds)
    engine = make_engine(runner, prefill_chunk=chunk)
    sampling = SamplingParams(max_tokens=6, temperature=0.0, repetition_penalty=1.0001)
    head, tail = [5] * 3, [6] * 9
    cached = []
    for rows, digest in (([1, 2, 3, 4, 5, 6], b"cat"), ([1, 2, 3, 4, 5, 7], b"dog"), ([1, 2, 3, 4, 5, 6], b"cat")):
        request = Request(segments=(head, GivenRows(rows, digest), tail), sampling=sampling)
        done = engine.submit(request).result(timeout=60)
        cached.append(done.cached_tokens)
        assert done.token_ids == runner.defined([*head, *(1000 + row for row in rows), *tail], 6)
        assert done.prompt_tokens == 18
    assert cached == [0, 0, 16]


def test_a_salt_keeps_requests_apart(make_engine, make_groups):
    engine = make_engine(make_groups(("full",)))
    sampling = SamplingParams(max_tokens=1, temperature=0.0)
    cached = [
        engine.submit(Request([1] * 9, sampling, cache_salt=salt)).result(timeout=60).cached_tokens
        for salt in (b"", b"a", b"b", b"a", b"")
    ]
    assert cached == [0, 0, 0, 8, 8]


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ((), "no tokens"),
        (([],), "no tokens"),
        ((EncoderInput(1, 4, b"a"),), "no tokens"),
        ((GivenRows([], b"a"), [1]), "empty"),
        ((GivenRows([1], b""), [1]), "digest"),
        ((GivenRows([1], "a"), [1]), "digest"),
        ((EncoderInput(1, 4, b"a"), EncoderInput(1, 4, b"a"), [1]), "two encoder inputs"),
        ((EncoderInput(1, 0, b"a"), [1]), "rows"),
        ((EncoderInput(1, 13, b"a"), [1]), "13 rows"),
        (([1, "x"],), "integers"),
        (([1, -2],), "token id -2"),
    ],
)
def test_bad_segments_are_refused(make_engine, make_groups, segments, message):
    engine = make_engine(make_groups(("full", "encoder")))
    with pytest.raises((InvalidRequestError, RequestTooLargeError), match=message):
        engine.submit(Request(segments=segments))


def test_what_a_runner_lacks_is_named(make_engine, make_runner):
    engine = make_engine(make_runner())
    for segment, capability in ((GivenRows([1], b"a"), "given_rows"), (EncoderInput(1, 4, b"a"), "encoder")):
        with pytest.raises(InvalidRequestError, match=capability):
            engine.submit(Request(segments=(segment, [1])))
    with pytest.raises(InvalidRequestError, match="one of them"):
        engine.submit(Request([1], segments=([1],)))


def test_a_group_that_is_not_reused_lets_nothing_be_found(make_engine, make_groups, greedy):
    from dataclasses import replace

    runner = make_groups(("full", "window"))
    runner.groups = (runner.groups[0], replace(runner.groups[1], reuse="none"))
    engine = make_engine(runner)
    for _ in range(2):
        done = engine.submit(greedy([1] * 20, 5)).result(timeout=60)
        assert (done.cached_tokens, done.token_ids) == (0, runner.defined([1] * 20, 5))


def test_context_limit_names_the_group(make_engine, make_groups, greedy):
    engine = make_engine(make_groups(("full", "window"), num_pages=9, shared=False))
    assert engine.max_context == 36 and "36 positions in its group 'full'" in engine.context_limit
    with pytest.raises(CaiError, match="group 'full'"):
        engine.submit(greedy([1] * 30, 7))
