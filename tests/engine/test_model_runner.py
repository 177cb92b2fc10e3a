"""The runner over a real, tiny model on the CPU kernels: seats, drafts, rows of a prompt."""

import numpy as np
import pytest
import torch

from cai_runtime.engine import model_runner
from cai_runtime.engine.beam_search import BeamSearch
from cai_runtime.engine.cache_layouts import PageCopy
from cai_runtime.engine.engine import Engine
from cai_runtime.engine.request import Request, SamplingParams
from cai_runtime.engine.segments import GIVEN, GivenRows, PlacedRows
from cai_runtime.engine.step import Feed, NewPages, ScheduledSequence, Step
from cai_runtime.errors import KernelError
from cai_runtime.kernels.batch import FULL
from cai_runtime.kernels.sampling import NEUTRAL, NO_TABLES, SamplingBatch
from cai_runtime.kernels.sampling_reference import logprobs as reference_logprobs
from tests.engine.test_beam_search import definition
from tests.engine.test_cuda_graphs import Replays, checkpoint, open_runner  # noqa: F401 - a fixture

IDS = [7, 3, 300, 41, 5, 5, 19, 2, 260, 77, 8, 120, 33, 64, 1, 9, 310, 44, 6, 28]
PAGES = [4, 9, 15, 21, 30]


@pytest.fixture
def runner(checkpoint):  # noqa: F811
    opened = open_runner(checkpoint, capture=None, backend="cpu")
    yield opened
    opened.close()


def one_by_one(runner):
    """The logits behind each token, in steps of one, without a seat."""
    return torch.cat([runner.run([ScheduledSequence([token_id], i, PAGES, 1)]) for i, token_id in enumerate(IDS)])


@pytest.mark.parametrize("rows_at_once", [256, 3])
def test_wanted_rows_are_those_of_single_steps(runner, monkeypatch, rows_at_once):
    monkeypatch.setattr(model_runner, "LOGIT_ROWS", rows_at_once)
    expected = one_by_one(runner)
    assert torch.equal(runner.run([ScheduledSequence(IDS, 0, PAGES, len(IDS))]), expected), "a prompt's logprobs"
    first = ScheduledSequence(IDS[:12], 0, PAGES, 0)
    draft = ScheduledSequence(IDS[12:16], 12, PAGES, 4)
    runner.run([first])
    beside = ScheduledSequence(IDS[:5], 0, [11], 1)
    assert torch.equal(runner.run([beside, draft]), torch.cat([expected[4:5], expected[12:16]]))


def test_launched_steps_over_seats_are_the_same(runner):
    expected = one_by_one(runner)
    greedy = SamplingBatch(np.repeat(NEUTRAL, 2), [NO_TABLES] * 2)
    first = runner.launch(Step([Feed(3, 0, IDS[:16], 0)], [NewPages(3, FULL, 0, [6])]))
    feeds = [Feed(0, 0, IDS[:4], 1), Feed(3, 16, IDS[16:18], 1)]
    second = runner.launch(Step(feeds, [NewPages(3, FULL, 1, [2]), NewPages(0, FULL, 0, [1])]))
    sampled = runner.sample(second, greedy)
    third = runner.launch(Step([Feed(3, 18, IDS[18:], 2)]))
    assert first.wait().shape == (0, runner.vocab_size)
    assert torch.equal(second.wait(), expected[[3, 17]])
    assert sampled.wait().ids.tolist() == expected[[3, 17]].argmax(-1).tolist()
    assert torch.equal(third.wait(), expected[18:])


class Words:
    def decode(self, token_ids, skip_special_tokens=True):
        return "".join(chr(0x100 + t) for t in token_ids)


class Guesses:
    """Drafts that are sometimes right: a tiny model repeats itself."""

    def propose(self, sequence):
        return sequence.token_ids[-3:]


def test_drafts_change_no_token_of_a_real_model(checkpoint):  # noqa: F811
    requests = [
        Request(
            IDS[: 3 + i], SamplingParams(max_tokens=24, temperature=t, seed=i, repetition_penalty=p, ignore_eos=True)
        )
        for i, (t, p) in enumerate([(0.0, 1.0), (0.7, 1.0), (0.0, 1.2), (1.0, 1.1)])
    ]

    texts = []
    for proposer in (None, Guesses()):
        with Engine(
            open_runner(checkpoint, capture=None, backend="cpu"), Words(), eos_token_ids=[2], proposer=proposer
        ) as engine:
            texts.append([handle.result().token_ids for handle in engine.submit_all(requests)])
            assert (engine.stats().drafts_taken > 0) == (proposer is not None)
    assert texts[0] == texts[1]


def test_what_the_model_does_not_take_is_named(runner):
    pages = [NewPages(0, FULL, 0, [1])]
    narrow = PlacedRows(0, torch.zeros(1, 47), b"a")
    with pytest.raises(KernelError, match=r"shape \[1, 47\]; this model takes \[n, 48\]"):
        runner.launch(Step([Feed(0, 0, [GIVEN], 1, inputs=(narrow,))], pages)).wait()
    with pytest.raises(KernelError, match="no encoder"):
        runner.launch(Step([Feed(0, 0, [1], 1)], pages, encode=[object()])).wait()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("rows_at_once", [256, 3])
def test_given_rows_take_the_place_of_embeddings(checkpoint, monkeypatch, backend, rows_at_once):  # noqa: F811
    """A token's own embedding given as a row: the logits of the token."""
    monkeypatch.setattr(model_runner, "LOGIT_ROWS", rows_at_once)
    runner = open_runner(checkpoint, capture=None, backend=backend)
    expected = runner.run([ScheduledSequence(IDS, 0, PAGES, len(IDS))])
    rows = runner._model.embed(torch.tensor(IDS[4:9], dtype=torch.int32))
    ids = [*IDS[:4], *[GIVEN] * 5, *IDS[9:]]
    beside = Feed(1, 0, [3, 4], 0)
    for count in (20, 6):  # whole, and in a chunk that ends among the given rows
        feed = Feed(0, 0, ids[:count], count, inputs=(PlacedRows(4, rows[: count - 4].numpy(), b"a"),))
        step = Step([beside, feed], [NewPages(0, FULL, 0, PAGES), NewPages(1, FULL, 0, [7])])
        torch.testing.assert_close(runner.launch(step).wait(), expected[:count], rtol=0, atol=2e-6)
    runner.close()


def test_an_engine_feeds_given_rows(checkpoint):  # noqa: F811
    """Through chunks, reuse of the prefix and decoding, on the plain path and on recorded steps."""
    texts, hits = [], []
    for capture in (None, Replays()):
        runner = open_runner(checkpoint, capture=capture)
        rows = runner._model.embed(torch.tensor(IDS[4:13], dtype=torch.int32))
        sampling = SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True)
        with Engine(runner, Words(), eos_token_ids=[2], prefill_chunk=7) as engine:
            for request in (
                Request(IDS, sampling),
                Request(segments=(IDS[:4], GivenRows(rows, b"rows"), IDS[13:]), sampling=sampling),
                Request(segments=(IDS[:4], GivenRows(rows, b"rows"), IDS[13:]), sampling=sampling),
            ):
                done = engine.submit(request).result(timeout=60)
                texts.append(done.token_ids)
                hits.append(done.cached_tokens)
    assert texts == texts[:1] * 6
    assert hits == [0, 4, 16] * 2


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_pages_are_copied_in_order(checkpoint, backend):  # noqa: F811
    """A sequence forked in the middle of a page, and a fork of the fork: each goes on as the first would."""
    runner = open_runner(checkpoint, capture=None, backend=backend)
    size = runner.page_size
    ids = [*IDS, *IDS][: 2 * size + 3]
    expected = runner.run([ScheduledSequence([*ids, 9], 0, [1, 2, 3], 1)])
    copies = [PageCopy(FULL, 3, 11), PageCopy(FULL, 11, 12), PageCopy(FULL, 3, 13)]
    for place in (13, 12, 11):
        step = Step([Feed(0, len(ids), [9], 1)], [NewPages(0, FULL, 0, [1, 2, place])], copies)
        torch.testing.assert_close(runner.launch(step).wait(), expected, rtol=0, atol=2e-6)
        copies = []
    runner.close()


@pytest.mark.parametrize("capture", [None, Replays])
def test_a_search_with_a_real_model_is_its_definition(checkpoint, capture):  # noqa: F811
    """Forks copy the pages of a real cache. The definition feeds each text anew, without a cache."""
    runner = open_runner(checkpoint, capture=None, backend="cpu")

    def row_of(tokens):
        row = runner.run([ScheduledSequence([*IDS[:7], *tokens], 0, PAGES, 1)])[0].numpy().copy()
        return reference_logprobs(row)

    beams = [BeamSearch(1), BeamSearch(3), BeamSearch(4, 1.5, 0.0)]
    wanted = [definition(row_of, beam, 14, ends=(5, 41)) for beam in beams]
    sampling = SamplingParams(max_tokens=14, temperature=0.0, stop_token_ids=(5, 41))
    requests = [Request(IDS[:7], sampling, beam=beam) for beam in beams]
    requests.append(Request(IDS[:7], SamplingParams(max_tokens=14, temperature=0.0)))
    opened = open_runner(checkpoint, capture=None if capture is None else capture(), backend="cpu")
    with Engine(opened, Words(), eos_token_ids=[]) as engine:
        found = [handle.result(timeout=60) for handle in engine.submit_all(requests)]
        engine.check_integrity()
    for done, (tokens, total) in zip(found, wanted, strict=False):
        assert done.token_ids == tokens
        assert sum(step.logprob for step in done.logprobs) == pytest.approx(total, abs=1e-4)
    runner.close()
