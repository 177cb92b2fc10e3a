"""One window: what is asked of the engine, how attempts are judged, which of them is taken."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from speech import FakeEngine, WordTokenizer, finished, log_softmax, scripted, small_tokens

from cai_runtime.speech.decoding import ShareOf, WindowTask, compression_ratio, encoder_input, is_silence
from cai_runtime.speech.options import Options
from cai_runtime.speech.prompts import Prompts, SpeechText

TOKENS = small_tokens()
T = TOKENS.timestamp_begin
ENCODER = encoder_input(np.zeros((3000, 2), np.float32), 1500)
DEFAULTS = Options()
VARIED = [3, 17, 44, 9, 61]
LOOP = [5, 6] * 40


def task(options=DEFAULTS, key=0, previous=()):
    text = SpeechText(WordTokenizer(), TOKENS)
    prompt = Prompts(TOKENS, options, text).window([TOKENS.sot], list(previous), first=True)
    return WindowTask(ENCODER, prompt, key, TOKENS, options, text)


def answered(one: WindowTask, *attempts, no_speech=0.0):
    """The window's result when attempt k gives the (tokens, log probability of each) in attempts[k], for every sample."""
    for ids, logprob in attempts:
        requests = one.requests()
        share = requests[-1].rules if isinstance(requests[-1].rules, ShareOf) else None
        samples = len(requests) - (share is not None)
        given = [finished([*ids, TOKENS.eot], [logprob] * (len(ids) + 1), 4)] * samples
        if share is not None:
            share.shares = np.array([no_speech])
            given.append(finished([1], [0.0], 1))
        result = one.take(given)
        if result is not None:
            return result
    return None


def test_first_attempt_passes():
    result = answered(task(), ([T, *VARIED, T + 100], -0.5))
    assert result.tokens == (T, *VARIED, T + 100) and result.ended
    assert result.avg_logprob == pytest.approx(-0.5)
    assert result.text == "w3 w17 w44 w9 w61"
    assert (result.temperature, result.generated, result.prompted) == (0.0, 9, 5)


def test_text_that_repeats_itself_is_asked_again():
    result = answered(task(), (LOOP, -0.1), (VARIED, -0.9))
    assert (result.temperature, result.text) == (0.2, "w3 w17 w44 w9 w61")


def test_unlikely_text_is_asked_again():
    assert answered(task(), (VARIED, -1.5), (VARIED, -0.9)).temperature == 0.2
    assert answered(task(Options(log_prob_threshold=None)), (VARIED, -1.5)).temperature == 0.0


def test_unlikely_text_without_speech_has_not_failed():
    result = answered(task(), (LOOP, -1.5), no_speech=0.9)
    assert result.temperature == 0.0 and is_silence(result, Options())
    assert not is_silence(result, Options(no_speech_threshold=None))
    assert not is_silence(replace(result, avg_logprob=-0.5), Options())
    assert is_silence(replace(result, avg_logprob=-0.5), Options(log_prob_threshold=None))


def test_if_all_fail_the_likeliest_that_does_not_repeat_itself_is_taken():
    attempts = [(LOOP, -0.1), (VARIED, -3.0), (VARIED[:2], -2.0), (LOOP, -0.2), (VARIED, -4.0), (LOOP, -0.1)]
    result = answered(task(), *attempts)
    assert result.text == "w3 w17" and result.temperature == 1.0  # of the last attempt: no prompt for what follows
    result = answered(task(), *[(LOOP, -1.0 - k) for k in range(6)])
    assert result.avg_logprob == pytest.approx(-1.0) and result.text == "w5 w6"


def test_text_that_loops_in_every_attempt_ends_with_the_first_turn():
    turn = [5, 6, 7, 8, 9]
    said = [T, 1, T + 50, T + 50, *turn, T + 100, T + 100, *turn, T + 150, T + 150, *turn, T + 200]
    result = answered(task(Options(temperature=0)), (said, -0.1))
    assert result.tokens == (T, 1, T + 50, T + 50, *turn, T + 100, T + 100)
    assert len(result.logprobs) == len(result.tokens)
    assert answered(task(Options(temperature=0)), ([1, *[5] * 20], -0.1)).tokens == (1, 5)
    whole = Options(temperature=0, compression_ratio_threshold=None)
    assert answered(task(whole), (said, -0.1)).tokens == tuple(said)
    assert answered(task(), (said, -0.1), (VARIED, -0.9)).text == "w3 w17 w44 w9 w61"


def test_requests_of_each_attempt():
    one = task(Options(beam_size=3, patience=2.0, length_penalty=0.5, best_of=4, temperature=(0, 0.4)))
    search, probe = one.requests()
    assert (search.beam.width, search.beam.patience, search.beam.length_penalty) == (3, 2.0, 0.5)
    assert search.sampling.temperature == 0 and search.sampling.logprobs == 0
    assert probe.segments[1] == [TOKENS.sot] and probe.sampling.max_tokens == 1
    assert one.take([finished(VARIED, [-9.0] * 5), finished([1], [0.0])]) is None
    samples = one.requests()
    assert [r.sampling.temperature for r in samples] == [0.4] * 4
    assert len({r.sampling.seed for r in samples}) == 4
    assert all(r.beam is None and r.segments is samples[0].segments for r in samples)


def test_seeds_depend_on_the_options_seed_and_the_window_alone():
    def seeds(**given):
        key = given.pop("key", 0)
        return [r.sampling.seed for r in task(Options(temperature=0.4, **given), key).requests()[:-1]]

    assert seeds() == seeds(seed=0) != seeds(seed=1)
    assert not set(seeds()) & set(seeds(key=300))


def test_the_best_sample_by_length_penalty():
    options = Options(temperature=0.5, best_of=2, log_prob_threshold=None, compression_ratio_threshold=None)
    short, long = finished([1], [-1.0]), finished([1, 2, 3, 4], [-0.5] * 4)

    def chosen(penalty):
        one = task(replace(options, length_penalty=penalty))
        return one.take([short, long, finished([1], [0.0])]).tokens

    assert chosen(1.0) == (1, 2, 3, 4)  # -0.5 a token beats -1
    assert chosen(0.0) == (1,)  # -1 in all beats -2


def test_a_text_cut_by_the_limit():
    one = task(Options(max_new_tokens=3))
    assert one.requests()[0].sampling.max_tokens == 3
    result = one.take([finished([T, 1, 2], [-0.4] * 3), finished([1], [0.0])])
    assert result.tokens == (T, 1, 2) and not result.ended
    assert result.avg_logprob == pytest.approx(-0.3)  # of 3 tokens and an end that did not come


def test_no_speech_is_the_share_behind_the_start():
    logits = scripted(lambda encoder: [T, 1, T + 50], TOKENS)

    def quiet(encoder, so_far, prompt):
        row = logits(encoder, so_far, prompt).copy()
        row[TOKENS.no_speech] = 21.0
        return row

    engine = FakeEngine(quiet, TOKENS.eot)
    one = task(previous=[8, 9])
    requests = one.requests()
    assert requests[-1].segments[1] == [TOKENS.sot_prev, 8, 9, TOKENS.sot]
    result = one.take([handle.result() for handle in engine.submit_all(requests)])
    row = quiet(ENCODER, [TOKENS.sot], 1)
    assert result.no_speech_prob == pytest.approx(math.exp(log_softmax(row)[TOKENS.no_speech]))
    assert result.tokens == (T, 1, T + 50)


def test_shares_among_some_tokens():
    row = np.log(np.array([1, 2, 3, 4], np.float32))
    share = ShareOf([1, 3], [1, 3])
    share(row, [])
    np.testing.assert_allclose(share.shares, [2 / 6, 4 / 6], rtol=1e-6)
    share(row[::-1].copy(), [2])  # behind the token that was asked about
    np.testing.assert_allclose(share.shares, [2 / 6, 4 / 6], rtol=1e-6)


def test_compression_ratio_is_zlibs():
    assert compression_ratio("") == 0
    assert compression_ratio("no word of this comes twice") < 1 < 5 < compression_ratio("again and " * 50)


def test_equal_features_have_equal_digests():
    features = np.random.default_rng(0).standard_normal((3000, 2)).astype(np.float32)
    assert encoder_input(features, 1500).digest == encoder_input(features[:, ::-1][:, ::-1], 1500).digest
    assert encoder_input(features, 1500).digest != encoder_input(features * 2, 1500).digest
