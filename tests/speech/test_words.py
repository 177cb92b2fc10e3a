"""Word times of a window: attention that is known, so that the times are."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cai_runtime.speech.heads import word_heads
from cai_runtime.speech.sounding import intersect, sounding_spans
from cai_runtime.speech.words import Line, WordOptions, window_words, word_timings

MELS = 8
RNG = np.random.default_rng(0)


def decode(tokens):
    return "".join(f" w{token}" for token in tokens)


def features(seconds, sounds):
    """Log-mel features that are loud between the seconds of `sounds` alone."""
    levels = np.full((round(seconds * 100), MELS), -0.9, np.float32)
    for start, end in sounds:
        levels[round(start * 100) : round(end * 100)] = 0.8
    return levels + RNG.normal(0, 0.02, levels.shape).astype(np.float32)


def attention(seconds, words, *, rows=1500, heads=2, front=1, end=None):
    """Weights that follow words (start, end), one token each; the end token looks behind the last one."""
    end = words[-1][1] if end is None else end
    weights = np.full((heads, front + len(words) + 1, rows), 1e-4)
    for at, (start, stop) in enumerate([*words, (end, seconds)]):
        weights[:, front + at, round(start * 50) : max(round(stop * 50), round(start * 50) + 1)] = 1.0
    return (weights / weights.sum(axis=2, keepdims=True)).astype(np.float32)


def timed(words, seconds, sounds, **options):
    tokens = range(len(words))
    found = word_timings(
        attention(seconds, words), tokens, [0.5] * len(words), decode, features(seconds, sounds), **options
    )
    return [(word.start, word.end) for word in found]


def close(found, expected, tolerance=0.1):
    return np.allclose(found, expected, atol=tolerance)


SAID = [(2.0, 2.4), (2.4, 2.8), (2.8, 3.2), (5.0, 5.4), (5.4, 6.0)]


def test_times_follow_the_attention():
    assert close(timed(SAID, 8, [(2.0, 3.2), (5.0, 6.0)]), SAID, 0.05)


def test_first_word_does_not_begin_in_the_silence_before():
    # The first token looks at the whole silence, too, as Whisper's does.
    words = [(0.0, 2.4), *SAID[1:]]
    assert close(timed(words, 8, [(2.0, 3.2), (5.0, 6.0)]), SAID)


def test_no_word_lasts_over_a_pause():
    words = [*SAID[:2], (2.8, 5.0), *SAID[3:]]
    assert close(timed(words, 8, [(2.0, 3.2), (5.0, 6.0)]), SAID)


def test_words_lie_within_speech_where_it_is_known():
    # The noise before and between the words is as loud as they are.
    words = [(0.0, 2.4), *SAID[1:2], (2.8, 5.0), *SAID[3:]]
    assert close(timed(words, 8, [(0.0, 8.0)], spans=[(2.0, 3.2), (5.0, 6.0)]), SAID)


def test_a_word_after_noise_is_no_longer_than_its_neighbours():
    start, end = timed([(0.0, 2.4), *SAID[1:]], 8, [(0.0, 8.0)])[0]
    assert end == pytest.approx(2.4, abs=0.05)
    assert end - start < 1.3


def test_spans_of_wrong_places_are_not_used():
    assert close(timed(SAID, 8, [(2.0, 3.2), (5.0, 6.0)], spans=[(7.0, 7.02)]), SAID, 0.05)
    assert close(timed(SAID, 8, [(2.0, 3.2), (5.0, 6.0)], spans=[]), SAID, 0.05)


def test_lag_moves_words_to_the_sound():
    late = [(start + 0.1, end + 0.1) for start, end in SAID]
    assert close(timed(late, 8, [(2.0, 3.2), (5.0, 6.0)], options=WordOptions(lag=0.1)), SAID, 0.05)


def test_segments_get_their_own_words():
    lines = [Line([0, 1, 2], [0.2, 0.4, 0.6]), Line([], []), Line([3, 4], [0.8, 1.0])]
    found = window_words(attention(8, SAID), lines, decode, features(8, [(2.0, 3.2), (5.0, 6.0)]), offset=60.0)
    assert ["".join(word.word for word in words) for words in found] == [" w0 w1 w2", "", " w3 w4"]
    assert [word.probability for words in found for word in words] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert close([(word.start - 60, word.end - 60) for words in found for word in words], SAID, 0.05)


def test_words_that_reach_out_of_their_segment_are_cut():
    line = Line(range(5), [0.5] * 5, start=2.0, end=4.2)
    words = [(1.0, 2.4), (2.4, 2.8), (2.8, 3.2), (3.2, 3.6), (3.6, 5.1)]
    (found,) = window_words(attention(8, words), [line], decode, features(8, [(0.0, 8.0)]))
    assert found[0].start == pytest.approx(2.0, abs=0.05)
    assert found[-1].end == pytest.approx(4.2, abs=0.05)


def test_no_text_has_no_words():
    assert window_words(np.zeros((2, 2, 10), np.float32), [Line([], [])], decode, features(1, [])) == [[]]
    assert window_words(np.zeros((2, 2, 10), np.float32), [], decode, features(1, [])) == []


@pytest.mark.parametrize(
    ("heads", "rows", "probabilities"), [(0, 4, 3), (2, 3, 3), (2, 4, 2)], ids=["heads", "rows", "probabilities"]
)
def test_sizes_that_contradict_are_refused(heads, rows, probabilities):
    with pytest.raises(ValueError, match=r"probabilities for|does not fit"):
        word_timings(np.ones((heads, rows, 9), np.float32), [1, 2, 3], [0.5] * probabilities, decode, features(1, []))


@settings(max_examples=150, deadline=None)
@given(
    counts=st.lists(st.integers(0, 12), max_size=4),
    frames=st.integers(0, 300),
    heads=st.integers(1, 3),
    spans=st.none() | st.lists(st.tuples(st.floats(-1, 4), st.floats(-1, 4)), max_size=3),
    times=st.lists(st.none() | st.floats(0, 4), min_size=8, max_size=8),
    lag=st.sampled_from([0.0, 0.1, 5.0]),
    quiet=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_times_are_ordered_and_within_the_window(counts, frames, heads, spans, times, lag, quiet, seed):
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.full(150, 0.05), (heads, sum(counts) + 1 + int(rng.integers(3)))).astype(np.float32)
    lines = [
        Line(rng.integers(0, 50, n).tolist(), rng.random(n).tolist(), times[2 * k], times[2 * k + 1])
        for k, n in enumerate(counts)
    ]
    if spans is not None:
        edges = sorted(edge for span in spans for edge in span)
        spans = list(zip(edges[::2], edges[1::2], strict=True))
    mel = rng.normal(0, 0.0 if quiet else 0.5, (frames, MELS)).astype(np.float32)
    found = window_words(weights, lines, decode, mel, spans=spans, offset=100.0, options=WordOptions(lag=lag))
    assert ["".join(word.word for word in words) for words in found] == [decode(line.tokens) for line in lines]
    edges = [edge for words in found for word in words for edge in (word.start, word.end)]
    assert edges == sorted(edges)
    assert all(100.0 <= edge <= 100.0 + frames / 100 + 1e-9 for edge in edges)
    assert all(0 <= word.probability <= 1 for words in found for word in words)


def test_heads_that_follow_words():
    assert word_heads(4, 2) == tuple((layer, head) for layer in (1, 2, 3) for head in (0, 1))
    assert word_heads(2, 1, [[1, 0]]) == ((1, 0),)
    assert word_heads(1, 2) == ((0, 0), (0, 1))
    assert word_heads(24, 1, [[3, 0], [7, 0]]) == ((3, 0), (7, 0))
    assert word_heads(24, 1) == tuple((layer, 0) for layer in range(12, 24))


def test_sounding_spans():
    found = sounding_spans(features(10, [(2.0, 3.0), (3.2, 4.0), (6.0, 7.5)]))
    assert close(found, [(2.0, 4.0), (6.0, 7.5)], 0.06)
    assert sounding_spans(features(10, [])) == [(0.0, 10.0)]
    assert sounding_spans(features(0, [])) == []


def test_noise_of_a_recording_beside_digital_silence_is_no_speech():
    mel = features(6, [(2.0, 3.0)])
    mel[150:350] = np.maximum(mel[150:350], 0.0)  # 32 dB below the speech, 36 above the silence
    assert close(sounding_spans(mel), [(2.0, 3.0)], 0.06)


def test_spans_in_common():
    assert intersect([(0, 2), (3, 5)], [(1, 4), (4.5, 9)]) == [(1, 2), (3, 4), (4.5, 5)]
    assert intersect([], [(1, 2)]) == []
