"""The cross-attention of a prompt's last tokens: complete and in order, however the prompt is computed."""

import numpy as np
import pytest

from cai_runtime.engine.alignment import Alignment
from cai_runtime.engine.request import Request, SamplingParams
from cai_runtime.engine.segments import EncoderInput
from cai_runtime.errors import InvalidRequestError, NonFiniteLogitsError, RunnerError

HEADS = ((1, 0), (0, 2), (1, 3))
AUDIO = EncoderInput(500, 9, b"audio")


@pytest.fixture
def make_aligning(make_groups):
    """make_aligning(**sizes): a runner with the capability."""

    class Aligning(make_groups):
        able = make_groups.able | {"cross_attention"}
        gives = staticmethod(lambda weights: weights)

        def _run(self, feed):
            yield from super()._run(feed)
            if feed.attention is not None:
                end = feed.start + len(feed.ids)
                found = [self.weights(feed, position) for position in range(end - feed.attention.count, end)]
                feed.attention.weights = self.gives(np.stack(found, axis=1))

        def weights(self, feed, position):
            return weights_at(self._read(feed.seat, "full", position), self._read(feed.seat, "encoder", 0))

    return lambda **sizes: Aligning(("full", "encoder"), **sizes)


def weights_at(text, audio):
    """fp32 [heads, 9] that a hash of all tokens up to a position and the audio determine."""
    rng = np.random.default_rng([text, audio])
    return np.stack([rng.random(9, np.float32) + 10 * layer + head for layer, head in HEADS])


def request(prompt, count, audio=AUDIO, **sampling):
    sampling = SamplingParams(max_tokens=0, temperature=0.0, **sampling)
    return Request(segments=(audio, prompt), sampling=sampling, alignment=Alignment(HEADS, count))


@pytest.fixture
def defined(make_groups):
    """defined(prompt, count): the weights by the definition of the model alone."""

    def compute(prompt, count):
        ends = range(len(prompt) - count + 1, len(prompt) + 1)
        return np.stack([weights_at(make_groups.fold(prompt[:end]), 500) for end in ends], axis=1)

    return compute


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({}, {"prefix_cache": False}),
        ({}, {"prefill_chunk": 5}),
        ({"num_pages": 18, "encoder_pages": 9}, {"prefill_chunk": 7}),
    ],
    ids=["whole", "chunks", "preempted"],
)
def test_it_is_the_models(make_engine, make_aligning, defined, greedy, prompts, sizes, options):
    engine = make_engine(make_aligning(**sizes), **options)
    asked = [(prompt, 1 + i % len(prompt)) for i, prompt in enumerate(prompts)]
    for _ in range(2):
        streams = engine.submit_all([greedy(prompt[:9], 30) for prompt in prompts[:6]])
        handles = [engine.submit(request(prompt, count)) for prompt, count in asked]
        for (prompt, count), handle in zip(asked, handles, strict=True):
            done = handle.result(timeout=60)
            assert (done.token_ids, done.finish_reason, done.attention.dtype) == ((), "length", np.float32)
            np.testing.assert_array_equal(done.attention, defined(prompt, count))
        for stream in streams:
            stream.result(timeout=60)
    assert not sizes or engine.stats().preemptions > 0


def test_what_comes_before_is_found_and_the_tokens_themselves_are_not(make_engine, make_aligning, defined):
    engine, prompt = make_engine(make_aligning()), [5, 6, 7] * 7
    for count, cached in ((21, 0), (6, 12), (2, 16), (21, 0)):
        done = engine.submit(request(prompt, count)).result(timeout=60)
        assert done.cached_tokens == cached
        np.testing.assert_array_equal(done.attention, defined(prompt, count))


def test_logprobs_of_the_prompt_come_with_it(make_engine, make_aligning, defined):
    engine, prompt = make_engine(make_aligning(), prefill_chunk=4), list(range(11))
    done = engine.submit(request(prompt, 5, prompt_logprobs=0)).result(timeout=60)
    alone = Request(segments=(AUDIO, prompt), sampling=SamplingParams(max_tokens=0, prompt_logprobs=0))
    assert done.prompt_logprobs == engine.submit(alone).result(timeout=60).prompt_logprobs
    np.testing.assert_array_equal(done.attention, defined(prompt, 5))


@pytest.mark.parametrize(
    ("gives", "error"),
    [
        (lambda weights: weights[:, :, :8], RunnerError),
        (lambda weights: None, RunnerError),
        (lambda weights: weights * np.nan, NonFiniteLogitsError),
    ],
    ids=["another shape", "nothing", "NaN"],
)
def test_wrong_weights_fail_their_request_alone(make_engine, make_aligning, gives, error):
    runner = make_aligning()
    runner.gives = gives
    engine = make_engine(runner)
    bad = engine.submit(request([1, 2], 1))
    plain = Request(segments=(AUDIO, [1, 2, 3]), sampling=SamplingParams(max_tokens=3, temperature=0.0))
    good = engine.submit(plain)
    with pytest.raises(error, match="cross-attention weights"):
        bad.result(timeout=60)
    assert good.result(timeout=60).token_ids == runner.defined([1, 2, 3], 3, 500)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alignment": Alignment((), 1)}, "heads is"),
        ({"alignment": Alignment(((0, -1),), 1)}, "heads is"),
        ({"alignment": Alignment((1, 2), 1)}, "heads is"),
        ({"alignment": Alignment(None, 1)}, "heads is None"),
        ({"alignment": 3}, "alignment is 3"),
        ({"rules": 3}, "rules is 3"),
        ({"alignment": Alignment(HEADS, 0)}, "count is 0; it must be from 1 to the prompt's 2"),
        ({"alignment": Alignment(HEADS, 3)}, "count is 3"),
        ({"alignment": Alignment(HEADS, 1.0)}, "count is 1.0"),
        ({"sampling": SamplingParams(max_tokens=1)}, "max_tokens is 0"),
        ({"sampling": SamplingParams(max_tokens=0, logprobs=1)}, "without logprobs"),
        ({"segments": ([1, 2],)}, "encoder's input"),
    ],
)
def test_refusals(make_engine, make_aligning, change, message):
    asked = request([1, 2], 1)
    for name, value in change.items():
        setattr(asked, name, value)
    with pytest.raises(InvalidRequestError, match=message):
        make_engine(make_aligning()).submit(asked)


def test_a_model_without_cross_attention_is_named(make_engine, make_groups):
    with pytest.raises(InvalidRequestError, match="capability 'cross_attention'"):
        make_engine(make_groups(("full", "encoder"))).submit(request([1, 2], 1))
