"""Masks in the engine: every token is one that its sequence's mask allows, whatever happens to the steps."""

from dataclasses import replace

import numpy as np
import pytest

from cai_runtime.engine.masks import MaskedRow, fill_masks
from cai_runtime.engine.request import Request, SamplingParams
from cai_runtime.errors import GrammarError

WAYS = [
    {"temperature": 0.0}, {"temperature": 1.0, "top_p": 0.9}, {"temperature": 0.8, "presence_penalty": 0.5},
    {"temperature": 1.5, "top_k": 5, "logit_bias": {96: 9.0, 95: -np.inf}}, {"temperature": 0.0, "stop": ("\u0120",)},
]  # fmt: skip


@pytest.fixture
def requests(prompts, hash_mask):
    """Every third one has no mask."""
    return [
        Request(
            prompt,
            SamplingParams(max_tokens=20, seed=i, **WAYS[i % len(WAYS)]),
            mask=None if i % 3 == 2 else hash_mask,
        )
        for i, prompt in enumerate(prompts)
    ]


def run_all(engine, requests):
    return [handle.result(timeout=60) for handle in engine.submit_all(requests)]


def outcome(done):
    return done.token_ids, done.text, done.finish_reason, done.stop_string


@pytest.mark.parametrize(
    ("runner", "options"),
    [
        ({"num_pages": 512}, {}),
        ({"num_pages": 512}, {"max_batch": 3, "prefill_chunk": 5}),
        ({"num_pages": 20}, {"prefill_chunk": 9}),  # 80 positions for 24 sequences of up to 80
    ],
    ids=["roomy", "few seats", "preempted"],
)
def test_texts_obey_their_masks_and_are_the_same_alone(make_engine, make_runner, requests, obeys, runner, options):
    plain = make_engine()
    alone = [plain.submit(request).result() for request in requests]
    engine = make_engine(make_runner(**runner), **options)
    together = run_all(engine, requests)
    assert list(map(outcome, together)) == list(map(outcome, alone))
    for request, done in zip(requests, together, strict=True):
        assert request.mask is None or obeys(done.token_ids)
    assert {done.finish_reason for done in together} == {"stop", "length"}
    assert runner["num_pages"] != 20 or engine.stats().preemptions > 0
    unmasked = run_all(engine, [replace(request, mask=None) for request in requests])
    assert sum(outcome(a) != outcome(b) for a, b in zip(unmasked, together, strict=True)) > 12, "the masks do something"


def test_a_step_that_is_tried_again_in_halves(make_engine, make_runner, requests):
    plain = make_engine()
    alone = [plain.submit(request).result() for request in requests]
    runner = make_runner(num_pages=512)
    run = runner.run

    def limited(step):
        if len(step) > 3:
            raise MemoryError("out of memory")
        return run(step)

    runner.run = limited
    engine = make_engine(runner)
    assert list(map(outcome, run_all(engine, requests))) == list(map(outcome, alone))
    assert engine.stats().retries > 0


class Broken:
    """A mask that leaves nothing, or raises."""

    name = "broken"

    def __init__(self, at, at_step=2):
        self.at, self.left = at, at_step

    def __call__(self, ends):
        return self

    def fill(self, row):
        self.left -= 1
        if self.left < 0 and self.at == "fill":
            raise GrammarError("it takes too much", param=self.name)
        if self.left < 0 and self.at == "nothing":
            row[:] = 0
        return True

    def accept(self, token_id):
        if self.left <= 0 and self.at == "accept":
            raise GrammarError("it went astray", param=self.name)

    def rollback(self, count):
        raise AssertionError("nothing was drafted")


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ("fill", "it takes too much"),
        ("accept", "it went astray"),
        ("nothing", "at position 4: 'broken'"),
    ],
)
def test_a_mask_that_fails_fails_its_request_alone(make_engine, greedy, expected, hash_mask, at, message):
    plain = make_engine()
    masked = replace(greedy([3, 4], ignore_eos=True), mask=hash_mask)
    alone = plain.submit(masked).result()
    engine = make_engine()
    requests = [greedy([1, 2]), replace(greedy([5, 6], ignore_eos=True), mask=Broken(at)), masked]
    first, bad, other = engine.submit_all(requests)
    with pytest.raises(GrammarError, match=message) as caught:
        bad.result()
    assert caught.value.param == "broken"
    assert first.result().token_ids == expected([1, 2], 20) and outcome(other.result()) == outcome(alone)


def test_an_abort_in_the_middle(make_engine, greedy, hash_mask, obeys):
    engine = make_engine()
    requests = [replace(greedy([i, 2], 100, ignore_eos=True), mask=hash_mask) for i in range(6)]
    handles = engine.submit_all(requests)
    handles[3].abort()
    assert all(obeys(handle.result().token_ids, ()) for i, handle in enumerate(handles) if i != 3)


def test_only_the_rows_that_have_masks_have_them(make_engine, make_runner, greedy, hash_mask, monkeypatch):
    from cai_runtime.engine import loop

    seen = []
    real = loop.sampling_batch

    def spy(samplers, positions, drafted, mask):
        seen.append(mask)
        return real(samplers, positions, drafted, mask)

    monkeypatch.setattr(loop, "sampling_batch", spy)
    engine = make_engine(prefix_cache=False)
    engine.submit(greedy([1, 2])).result()
    assert set(map(type, seen)) == {type(None)}, "no mask costs nothing"
    seen.clear()
    requests = [greedy([1, 2], 9, ignore_eos=True), replace(greedy([3], 9, ignore_eos=True), mask=hash_mask)]
    for handle in engine.submit_all(requests):
        handle.result()
    both = [mask for mask in seen if mask is not None and len(mask) == 2]
    assert both and all((mask[0] == 0xFFFFFFFF).all() and (mask[1] != 0xFFFFFFFF).any() for mask in both)


def test_a_step_in_which_nobody_asks_does_nothing_more(make_engine, prompts, monkeypatch):
    """No mask is filled, no logprob is computed or read, no row has a processor."""
    from cai_runtime.engine import flight, loop

    batches, calls = [], []
    real_batch, real_masks, real_read = loop.sampling_batch, loop.fill_masks, flight.logprobs_of

    def batch(*args):
        batches.append(real_batch(*args))
        return batches[-1]

    monkeypatch.setattr(loop, "sampling_batch", batch)
    monkeypatch.setattr(loop, "fill_masks", lambda *args: calls.append("masks") or real_masks(*args))
    monkeypatch.setattr(flight, "logprobs_of", lambda *args: calls.append("logprobs") or real_read(*args))
    plain = [Request(prompt, SamplingParams(max_tokens=12, seed=i, stop=("q",))) for i, prompt in enumerate(prompts)]
    run_all(make_engine(), plain)
    assert calls == [] and batches
    for found in batches:
        assert (found.mask, found.logprobs, found.scored) == (None, None, None) and not found.custom
    run_all(make_engine(), [replace(plain[0], sampling=replace(plain[0].sampling, logprobs=0)), *plain[1:]])
    assert set(calls) == {"logprobs"}


class Together:
    """A mask that is filled with others in one call."""

    name, calls = "together", []

    def __init__(self, word, error=None):
        self.word, self.error = word, error

    @staticmethod
    def fill_all(masks, rows):
        Together.calls.append(len(masks))
        for mask, row in masks:
            rows[row] = mask.word
        return {row: mask.error for mask, row in masks if mask.error}


def test_masks_of_a_kind_are_filled_in_one_call():
    Together.calls.clear()
    error = GrammarError("no")
    places = [MaskedRow(row, Together(row, error if row == 3 else None), (), ()) for row in (1, 3, 4)]
    rows, errors = fill_masks(places, 6, 40)
    assert Together.calls == [3] and errors == {3: error}
    assert rows.tolist() == [[0xFFFFFFFF] * 2, [1] * 2, [0xFFFFFFFF] * 2, [3] * 2, [4] * 2, [0xFFFFFFFF] * 2]


def test_a_draft_is_masked_as_far_as_it_is_allowed(hash_mask):
    mask, free = hash_mask([96]), hash_mask([96])
    draft = []
    for _ in range(3):
        draft.append(int(np.flatnonzero(free.allowed()[:96])[0]))
        free.accept(draft[-1])
    bad = int(np.flatnonzero(~free.allowed()[:95])[0])
    rows, errors = fill_masks([MaskedRow(1, mask, [*draft, bad, 5], [96])], 7, 97)
    assert errors == {} and len(mask.states) == 1, "what was accepted for the rows is taken back"
    for i in range(4):
        bits = np.unpackbits(rows[1 + i].view(np.uint8), bitorder="little")[:97]
        assert (bits == mask.allowed()).all()
        if i < 3:
            mask.accept(draft[i])
    assert (rows[[0, 5, 6]] == 0xFFFFFFFF).all(), "behind a token that is not allowed nothing matters"
