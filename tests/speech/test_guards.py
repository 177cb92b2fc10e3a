"""Invented text by its signals: what each says, that two are needed, and what outweighs them."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cai_runtime.speech.guards import ASTRAY, ENOUGH, FOLLOWS, Evidence, following, is_suspicious, judge

SPOKEN = Evidence(tokens=12, avg_logprob=-0.4, no_speech_prob=0.05, heard=0.9, following=0.35)


def attention(rows, width=400, *, moves, heads=3, front=1, seed=0):
    """Weights that move along the positions with the tokens, or look at the same places with little differences."""
    rng = np.random.default_rng(seed)
    weights = rng.random((heads, front + rows + 1, width)) * 0.2 + 0.01
    for row in range(rows + 1):
        at = int((row + 0.5) / (rows + 1) * width) if moves else width // 3
        weights[:, front + row, max(0, at - 9) : at + 10] += 2.0
    return (weights / weights.sum(axis=2, keepdims=True)).astype(np.float32)


def test_spoken_text_stays():
    assert not judge(SPOKEN).invented
    assert judge(SPOKEN).follows
    assert not is_suspicious(SPOKEN)


def test_nothing_known_says_nothing():
    assert not judge(Evidence(tokens=5)).invented
    assert not is_suspicious(Evidence(tokens=5))


BAD = {
    "no_speech_prob": (0.9, "no speech with probability 0.90"),
    "avg_logprob": (-2.0, "unlikely: mean log probability -2.00"),
    "anomalous": (True, "words too"),
    "heard": (0.0, "speech in 0% of its time"),
    "rate": (0.07, "0.07 tokens a second of sound"),
    "following": (0.05, "attention does not follow the audio: 0.05"),
}


@pytest.mark.parametrize("name", BAD)
def test_each_signal_is_a_reason_and_none_is_enough(name):
    value, reason = BAD[name]
    verdict = judge(Evidence(**{"tokens": 12, name: value}))
    assert not verdict.invented
    assert len(verdict.reasons) == 1
    assert verdict.reasons[0].startswith(reason)
    assert is_suspicious(Evidence(**{"tokens": 12, name: value}))


@pytest.mark.parametrize("one", BAD)
@pytest.mark.parametrize("other", BAD)
def test_two_signals_are_enough(one, other):
    same = one == other or {one, other} == {"avg_logprob", "anomalous"}  # unlikely words make unlikely text
    assert judge(Evidence(tokens=12, **{one: BAD[one][0], other: BAD[other][0]})).invented != same


def test_attention_that_follows_outweighs_the_rest():
    bad = {"no_speech_prob": 0.9, "avg_logprob": -2.0, "heard": 0.0}
    assert judge(Evidence(tokens=12, **bad)).invented
    assert not judge(Evidence(tokens=12, following=FOLLOWS, **bad)).invented
    assert judge(Evidence(tokens=12, following=(ASTRAY + FOLLOWS) / 2, **bad)).invented


def test_attention_of_a_token_or_two_says_nothing():
    assert judge(Evidence(tokens=2, following=0.0)).reasons == ()
    assert judge(Evidence(tokens=2, following=0.9, no_speech_prob=0.9, avg_logprob=-2.0)).invented


def test_thresholds_are_the_callers():
    loop = Evidence(tokens=100, no_speech_prob=0.9, avg_logprob=-0.4, following=0.0)
    assert judge(loop).invented
    assert not judge(loop, no_speech=None).invented
    assert not judge(loop, no_speech=0.95).invented
    assert judge(loop, no_speech=None, unlikely=-0.3).invented
    few = Evidence(tokens=2, avg_logprob=-2.0, rate=0.1)
    assert judge(few).invented
    assert not judge(few, no_speech=None).invented
    assert judge(replace(few, tokens=ENOUGH - 1, following=FOLLOWS)).invented  # too few to follow
    assert not judge(replace(few, tokens=ENOUGH, following=FOLLOWS)).invented


@pytest.mark.parametrize("rows", [3, 12, 80])
def test_attention_that_moves_follows(rows):
    assert following(attention(rows, moves=True), [rows], 800)[0] > FOLLOWS


@pytest.mark.parametrize("rows", [3, 12, 80])
def test_attention_that_stays_does_not_follow(rows):
    assert following(attention(rows, moves=False), [rows], 800)[0] < ASTRAY


def test_an_invented_end_is_told_from_the_speech_before_it():
    spoken, stuck = attention(30, moves=True), attention(10, moves=False, seed=1)
    weights = np.concatenate((spoken[:, :31], stuck[:, 1:]), axis=1)  # 30 spoken rows, 10 invented, the end
    first, second, empty = following(weights, [30, 10, 0], 800)
    assert first > FOLLOWS
    assert second < ASTRAY
    assert empty == 0.0


@given(st.lists(st.integers(0, 9), max_size=4), st.integers(0, 3000), st.integers(0, 2**32 - 1))
def test_following_is_a_share(counts, frames, seed):
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.full(50, 0.1), (2, sum(counts) + 2)).astype(np.float32)
    found = following(weights, counts, frames)
    assert len(found) == len(counts)
    assert all(0 <= value <= 1 for value in found)


def test_sizes_that_contradict_are_refused():
    with pytest.raises(ValueError, match="does not fit 4 text tokens"):
        following(np.ones((1, 4, 10), np.float32), [4], 20)
    with pytest.raises(ValueError, match="0 heads"):
        following(np.ones((0, 9, 10), np.float32), [4], 20)
