"""Requests with beam search give what the definition gives, whatever runs beside them and however little memory there is."""

import gc
import random
import weakref

import numpy as np
import pytest

from cai_runtime.engine.beam_search import BeamSearch, Search
from cai_runtime.engine.output import TokenOutput
from cai_runtime.engine.request import Request, SamplingParams
from cai_runtime.engine.segments import EncoderInput
from cai_runtime.errors import RequestTooLargeError
from cai_runtime.kernels.sampling_reference import logprobs as reference_logprobs

EOS = 96


def definition(row_of, beam, max_tokens, ends=(EOS,)):
    """(tokens, sum of logprobs) by the definition alone. row_of(tokens): float64 logprobs of the next token."""
    live, finished, most = [((), 0.0)], [], max(1, round(beam.width * beam.patience))
    for length in range(1, max_tokens + 1):
        proposed = []
        for tokens, total in live:
            row = row_of(tokens)
            best = [t for t in np.argsort(-row, kind="stable")[: 2 * beam.width].tolist() if row[t] > -9999]
            proposed += [((*tokens, token), total + float(row[token])) for token in best]
        proposed.sort(key=lambda path: -path[1])
        live = []
        for path in proposed:
            if path[0][-1] in ends:
                finished += [path][: most - len(finished)]
            else:
                live.append(path)
            if len(live) == beam.width:
                break
        if len(finished) == most or not live:
            break
        if length == max_tokens:
            finished += live[: most - len(finished)]

    def score(path):
        tokens, total = path
        return total / max(1, len(tokens) - (tokens[-1] in ends)) ** beam.length_penalty

    return max(finished, key=score)


def top_rows(rows, k):
    """What `Sampled.top` has of rows of logprobs."""
    found = [np.argsort(-row, kind="stable")[:k].tolist() for row in rows]
    return [(ids, [float(row[i]) for i in ids]) for ids, row in zip(found, rows, strict=True)]


@pytest.mark.parametrize("seed", range(60))
def test_the_search_alone(seed):
    """Random vocabularies, from one token on, and widths, patience and penalties; ends, bans and ties among them."""
    rng = np.random.default_rng(seed)
    vocab, width, max_tokens = int(rng.integers(1, 12)), int(rng.integers(1, 7)), int(rng.integers(1, 8))
    beam = BeamSearch(width, float(rng.choice([0.1, 0.5, 1, 1.5, 2])), float(rng.choice([0, 0.6, 1, 2, -1])))
    ends = set(rng.choice(vocab, int(rng.integers(0, min(3, vocab) + 1)), replace=False).tolist())
    scale, made = float(rng.choice([0.0, 1, 5])), {}

    def row_of(tokens):
        if tokens not in made:
            row = (rng.normal(size=vocab) * scale).round(1)
            row[1:][rng.random(vocab - 1) < 0.2] = -np.inf
            made[tokens] = np.maximum(row - np.log(np.exp(row).sum()), -9999.0)
        return made[tokens]

    search = Search(beam, ends, max_tokens)
    parents = [0]
    while parents is not None:
        texts = [tuple(step.token_id for step in path.steps()) for path in search.live]
        parents = search.step(top_rows([row_of(text) for text in texts], 2 * width))
    path = search.winner()
    tokens, total = definition(row_of, beam, max_tokens, ends)
    assert tuple(step.token_id for step in path.steps()) == tokens
    assert path.sum == pytest.approx(total) == sum(step.logprob for step in path.steps())


@pytest.fixture
def make_beam(logits_behind):
    """make_beam(prompt, beam, ...) -> (request, the tokens of the definition)."""

    def make(prompt, beam, max_tokens=12, rules=None, **sampling):
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, **sampling)

        def row_of(tokens):
            row = logits_behind([*prompt, *tokens])
            if rules is not None:
                rules(row, tokens)
            for token, bias in params.logit_bias.items():
                row[token] += bias
            return reference_logprobs(row)

        wanted, _ = definition(row_of, beam, max_tokens)
        return Request(list(prompt), params, rules=rules, beam=beam), wanted

    return make


def few(logits, generated):
    """Nine tokens at each place, which the tokens before determine, and the end."""
    banned = np.ones(len(logits), bool)
    banned[np.random.default_rng([7, *generated]).choice(95, 9, replace=False)] = banned[EOS] = False
    logits[banned] = -np.inf
    logits[EOS] += 1.5


BEAMS = [
    BeamSearch(2), BeamSearch(3, 2.0), BeamSearch(4, 0.5, 0.0), BeamSearch(1), BeamSearch(5, 1.0, 0.6),
    BeamSearch(2, 1.5, 2.0),
]  # fmt: skip


@pytest.fixture
def searches(make_beam, prompts):
    """(request, tokens) of several kinds."""
    kinds = [{}, {"rules": few}, {"logit_bias": {EOS: 5.0}}, {"rules": few, "logprobs": 2}]
    return [
        make_beam(prompt, BEAMS[i % len(BEAMS)], 2 + i % 11, **kinds[i % len(kinds)])
        for i, prompt in enumerate(prompts)
    ]


def results(engine, requests):
    return [handle.result(timeout=60) for handle in engine.submit_all(requests)]


def test_a_request_alone(make_engine, searches):
    engine = make_engine(max_batch=5)
    for request, wanted in searches:
        done = engine.submit(request).result(timeout=60)
        assert done.token_ids == wanted
        ended = wanted[-1] == EOS
        assert done.finish_reason == ("stop" if ended else "length")
        assert done.text == "".join(chr(0x100 + t) for t in wanted if t != EOS)
        assert [found.token_id for found in done.logprobs] == list(wanted)
        assert {len(found.top) for found in done.logprobs} == {request.sampling.logprobs or 0}
        engine.check_integrity()
    stats = engine.stats()
    assert stats.tokens_decoded == sum(len(wanted) for _, wanted in searches)
    assert (stats.finished, stats.running, stats.waiting) == (len(searches), 0, 0)
    assert {tokens[-1] == EOS for _, tokens in searches} == {True, False}, "both kinds of ends are here"


def test_logprobs_are_of_what_the_search_went_by(make_engine, make_beam, logits_behind):
    request, wanted = make_beam([3, 1, 4], BeamSearch(3), rules=few, logit_bias={5: 2.0}, logprobs=1)
    done = make_engine().submit(request).result(timeout=60)
    for i, found in enumerate(done.logprobs):
        row = logits_behind([3, 1, 4, *wanted[:i]])
        few(row, wanted[:i])
        row[5] += 2.0
        assert found.logprob == pytest.approx(reference_logprobs(row)[wanted[i]], abs=1e-5)
        assert found.top[0][0] == row.argmax()


def test_a_width_of_one_is_greedy(make_engine, prompts, greedy, expected):
    engine = make_engine()
    penalties = {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "min_tokens": 5, "logit_bias": {EOS: 3.0}}
    for prompt in prompts[:8]:
        for sampling in ({}, penalties):
            plain, beam = greedy(prompt, 15, **sampling), greedy(prompt, 15, **sampling)
            beam.beam = BeamSearch(1)
            one, other = results(engine, [plain, beam])
            assert (one.token_ids, one.text, one.finish_reason) == (other.token_ids, other.text, other.finish_reason)


@pytest.mark.parametrize(
    ("runner", "options"),
    [
        ({"num_pages": 512}, {}),
        ({"num_pages": 512}, {"prefix_cache": False, "prefill_chunk": 5}),
        ({"num_pages": 40}, {"prefill_chunk": 9, "max_batch": 9}),
        ({"num_pages": 40}, {"prefix_cache": False, "max_batch": 16}),
        ({"num_pages": 150, "page_size": 1}, {"max_batch": 7}),
        ({"num_pages": 512}, {"max_batch": 5}),
    ],
    ids=["roomy", "chunks", "preempted", "preempted without reuse", "tiny pages", "few seats"],
)
def test_beside_each_other_and_plain_requests(
    make_engine, make_runner, greedy, expected, prompts, searches, runner, options
):
    engine = make_engine(make_runner(**runner), **options)
    requests, wanted = [], []
    for prompt, (request, tokens) in zip(prompts, searches, strict=True):
        requests += [greedy(prompt, 14), request]
        wanted += [expected(prompt, 14), tokens]
    for _ in range(2):  # the second time much is found
        assert [done.token_ids for done in results(engine, requests)] == wanted
        engine.check_integrity()
    assert runner["num_pages"] != 40 or engine.stats().preemptions > 0
    assert engine.stats().finished == 2 * len(requests)


def test_a_group_that_just_fits_ends(make_engine, make_runner, make_beam):
    """The smallest cache that takes a request holds it, whatever it forks."""
    prompt = list(range(11))
    for width in (2, 5):
        request, wanted = make_beam(prompt, BeamSearch(width), 17, rules=few, logit_bias={EOS: -100.0})
        for pages in range(4, 60):
            engine = make_engine(make_runner(num_pages=pages))
            try:
                handle = engine.submit(request)
            except RequestTooLargeError:
                continue
            assert handle.result(timeout=60).token_ids == wanted
            assert engine.stats().preemptions == 0 and pages == 2 + width * 5
            break


COMBINATIONS = [("full",), ("window",), ("full", "window"), ("state",), ("full", "state"), ("full", "window", "state")]


@pytest.mark.parametrize("kinds", COMBINATIONS, ids="+".join)
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_the_smallest_caches_that_take_a_group_hold_it(make_engine, make_groups, kinds, prefix_cache):
    for length, width in ((11, 2), (8, 5), (3, 4)):
        sampling = SamplingParams(max_tokens=26, temperature=0.0, ignore_eos=True)
        request = Request(list(range(length)), sampling, rules=few, beam=BeamSearch(width))
        wanted = make_engine(make_groups(kinds, num_pages=200, slots=60)).submit(request).result(timeout=60).token_ids
        for pages in range(4, 100):
            runner = make_groups(kinds, num_pages=pages, slots=3 * width)
            engine = make_engine(runner, prefix_cache=prefix_cache)
            try:
                handle = engine.submit(request)
            except RequestTooLargeError:
                continue
            assert handle.result(timeout=20).token_ids == wanted
            assert engine.stats().preemptions == 0
            break


@pytest.mark.parametrize("kinds", COMBINATIONS, ids="+".join)
@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize(("pages", "slots"), [(200, 60), (46, 15)], ids=["roomy", "preempted"])
def test_models_of_several_caches(make_engine, make_groups, greedy, kinds, prefix_cache, pages, slots):
    """Alone with all memory, which the first engine checks against greedy for width 1, and in a crowd."""
    rng = random.Random(2)
    prompts = [[rng.randrange(90) for _ in range(rng.randrange(1, 20))] for _ in range(10)]
    requests = [
        Request(prompt, SamplingParams(max_tokens=9, temperature=0.0), rules=few, beam=BEAMS[i % len(BEAMS)])
        for i, prompt in enumerate(prompts)
    ]
    roomy = make_engine(make_groups(kinds, num_pages=200, slots=60), max_batch=5)
    alone = [roomy.submit(request).result(timeout=60).token_ids for request in requests]
    runner = make_groups(kinds, num_pages=pages, slots=slots)
    engine = make_engine(runner, max_batch=11, prefill_chunk=7, prefix_cache=prefix_cache)
    handles = engine.submit_all([item for r in requests for item in (r, greedy(r.prompt_ids, 9))])
    found = [handle.result(timeout=60).token_ids for handle in handles]
    assert found[::2] == alone
    assert found[1::2] == [runner.defined(prompt, 9) for prompt in prompts]
    engine.check_integrity()


def test_an_encoders_output_is_shared(make_engine, make_groups):
    runner = make_groups(("full", "encoder"))
    engine = make_engine(runner, max_batch=8)
    sampling = SamplingParams(max_tokens=9, temperature=0.0)
    audio = EncoderInput(777, 9, b"777")
    beam = Request(segments=(audio, [1, 2, 3]), sampling=sampling, beam=BeamSearch(3), output=TokenOutput)
    plain = Request(segments=(audio, [1, 2, 3]), sampling=sampling)
    first, *_ = results(engine, [beam, beam, plain])
    again, greedy = results(engine, [beam, plain])
    assert first.token_ids == again.token_ids and first.logprobs == again.logprobs
    assert greedy.token_ids == runner.defined([1, 2, 3], 9, 777)
    assert runner.encoded == [b"777"]


def test_nothing_of_a_request_outlives_it(make_engine, make_groups):
    """What was encoded is megabytes, and the collector of cycles comes late."""
    engine = make_engine(make_groups(("full", "encoder")), max_batch=4)
    audio = EncoderInput(777, 9, b"777")
    seen = weakref.ref(audio)
    sampling = SamplingParams(max_tokens=9, temperature=0.0)
    requests = [Request(segments=(audio, [1, 2, 3]), sampling=sampling, beam=BeamSearch(3), output=TokenOutput)]
    gc.disable()
    try:
        results(engine, requests)
        del audio, requests
        engine.close()
        assert seen() is None
    finally:
        gc.enable()


def test_drafts_are_for_plain_requests(make_engine, make_runner, searches, greedy, prompts, expected):
    class Knowing:
        def propose(self, sequence):
            assert sequence.beam is None
            return list(expected(sequence.token_ids, 3))

    engine = make_engine(make_runner(num_pages=512), proposer=Knowing())
    requests = [request for request, _ in searches] + [greedy(prompt) for prompt in prompts]
    found = [done.token_ids for done in results(engine, requests)]
    assert found == [tokens for _, tokens in searches] + [expected(prompt, 20) for prompt in prompts]
    assert engine.stats().drafts_taken > 0
