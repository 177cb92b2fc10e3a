"""Windows decoded together, by a scripted model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import speech
from hypothesis import given, settings
from hypothesis import strategies as st
from speech import FakeEngine, Track, WordTokenizer, draw_tokens, drive, place, scripted, small_tokens

from cai_runtime.speech.decoding import ShareOf
from cai_runtime.speech.options import Options
from cai_runtime.speech.prompts import SpeechText
from cai_runtime.speech.sounding import SMOOTHED, longest_pause
from cai_runtime.speech.transcriber import transcribe_steps

TOKENS = small_tokens()
MANY = small_tokens(("en", "de"))
T = TOKENS.timestamp_begin
BATCHED = Options(beam_size=1, temperature=0, batched=True, windows_together=3)


def run(frames, logits, options=BATCHED, tokens=TOKENS, track=None):
    """(transcript, what was done, engine, track) of audio with so many frames."""
    track = track or Track(frames)
    return *speech.run(logits, options, tokens, track), track


def talk(words, frames):
    """A track that is loud where a word (start, end, token) is spoken."""
    features = np.full((frames, 3), -1.0, np.float32)
    for start, end, _ in words:
        features[start:end, :2] = 1.0
    features[:, -1] = 0
    return Track(frames, features, mels=3)


def heard(words):
    """A model that hears the words whose middle its window holds in full loudness."""

    def script(encoder):
        begin, said = place(encoder), []
        end = begin + int((encoder.features[:, 0] > -1).nonzero()[0].max(initial=-1)) + 1
        for first, last, token in words:
            if begin <= first and last <= end:
                said += [T + (first - begin) // 2, token, T + (last - begin) // 2]
        return said

    return scripted(script, TOKENS)


def prompts_of(engine):
    return [r.segments[1] for r in engine.requests if not isinstance(r.rules, ShareOf)]


def test_windows_are_cut_where_it_is_quiet_and_lose_nothing():
    words = [(k * 430 + 20, k * 430 + 400, k % 90 + 1) for k in range(40)]
    transcript, found, _, track = run(17_300, heard(words), BATCHED, track=talk(words, 17_300))
    assert [t for s in transcript.segments for t in s.tokens if t < T] == [w[2] for w in words]
    times = [(s.start, s.end) for s in transcript.segments]  # a timestamp's step is two frames
    np.testing.assert_allclose(times, [(w[0] / 100, w[1] / 100) for w in words], atol=0.011)
    assert [s.id for s in transcript.segments] == list(range(40))
    assert [done.end for done in found] == sorted(done.end for done in found)
    assert found[-1].end == 173.0
    loud = track.all[:, 0] > 0
    assert not any(loud[start - 1] and loud[start] for start in track.starts[1:-1])


def test_every_option_of_the_caller_is_kept():
    options = replace(
        BATCHED,
        initial_prompt="w7 w8",
        prefix="w5",
        hotwords="w9",
        without_timestamps=True,
        language="de",
        task="translate",
        max_new_tokens=9,
        max_initial_timestamp=0.5,
    )
    logits = scripted(lambda encoder: [place(encoder) // 3000 + 1], MANY)
    transcript, _, engine, _ = run(8000, logits, options, MANY)
    start = [MANY.sot_prev, 9, 7, 8, MANY.sot, MANY.languages["de"], MANY.translate, MANY.no_timestamps]
    assert prompts_of(engine)[:2] == [[*start, 5], start]
    decoded = [r for r in engine.requests if r.alignment is None]
    assert {r.sampling.max_tokens for r in decoded} == {9, 1}
    assert all(r.rules.max_initial == 25 for r in decoded if not isinstance(r.rules, ShareOf))
    assert not any(t >= MANY.timestamp_begin for s in transcript.segments for t in s.tokens)


def test_several_windows_are_in_the_engine_at_once():
    words = [(k * 430 + 20, k * 430 + 400, k % 90 + 1) for k in range(40)]
    steps = transcribe_steps(talk(words, 17_300), TOKENS, BATCHED, SpeechText(WordTokenizer(), TOKENS))
    engine = FakeEngine(heard(words), TOKENS.eot)
    next(drive(steps, engine))
    assert len(prompts_of(engine)) >= 3


def test_a_window_that_failed_is_asked_again_alone():
    words = [(k * 430 + 20, k * 430 + 400, k % 90 + 1) for k in range(20)]
    good = heard(words)
    features = talk(words, 8600)

    def logits(encoder, so_far, prompt):
        row = good(encoder, so_far, prompt)
        # The second window is unsure of all its words.
        return row * 0.2 if 2000 < place(encoder) < 4000 else row

    options = replace(BATCHED, temperature=(0.0, 0.4, 1.0), best_of=2, log_prob_threshold=-0.5)
    transcript, _, engine, _ = run(8600, logits, options, track=features)
    temperatures = [r.sampling.temperature for r in engine.requests if r.rules and not isinstance(r.rules, ShareOf)]
    windows = len({r.segments[0].digest for r in engine.requests})
    assert temperatures.count(0.0) == windows and temperatures.count(0.4) == 2 and temperatures.count(1.0) == 2
    assert [s.id for s in transcript.segments] == list(range(len(transcript.segments)))
    starts = [s.start for s in transcript.segments]
    assert starts == sorted(starts)


def test_what_a_window_leaves_unheard_is_heard_next():
    def script(encoder):
        begin = place(encoder)
        if begin == 0:  # comes to its limit of tokens at a pair of times
            return [T, 1, T + 500, T + 500, 4, T + 900]
        return [T, 2, T + 200] if begin == 1000 else [T, 3, T + 100]

    transcript, _, _, _ = run(2900, scripted(script, TOKENS), replace(BATCHED, max_new_tokens=4))
    assert [(s.text, s.start, s.end) for s in transcript.segments] == [(" w1", 0.0, 10.0), (" w2", 10.0, 14.0)]


def test_a_phrase_at_the_end_is_not_left_to_a_window_that_begins_behind_it():
    said = scripted(lambda encoder: [T, 1, T + 500, T + 500], TOKENS)

    def logits(encoder, so_far, prompt):
        row = said(encoder, so_far, prompt)
        row[2] = row.max() - 1.0  # the second choice: a word
        return row

    transcript, _, engine, _ = run(2900, logits, BATCHED)
    assert transcript.segments[1].text.startswith(" w2")
    assert len({r.segments[0].digest for r in engine.requests}) == 1


def test_text_without_an_end_time_is_kept():
    transcript, _, _, _ = run(2900, scripted(lambda encoder: [T, 1, T + 500, T + 500, 2], TOKENS), BATCHED)
    assert [(s.text, s.start, s.end) for s in transcript.segments] == [(" w1", 0.0, 10.0), (" w2", 10.0, 29.0)]


def test_language_is_detected_once_a_file():
    logits = scripted(lambda encoder: [place(encoder) // 3000 + 1], MANY)

    def german(encoder, so_far, prompt):
        row = logits(encoder, so_far, prompt)
        row[MANY.languages["de"]] = 3.0 if place(encoder) == 0 else -3.0
        return row

    transcript, _, engine, _ = run(9000, german, replace(BATCHED, without_timestamps=True), MANY)
    assert transcript.language == "de"
    assert {p[1] for p in prompts_of(engine)} == {MANY.languages["de"]}


def test_windows_together_do_not_change_the_text():
    words = [(k * 430 + 20, k * 430 + 400, k % 90 + 1) for k in range(40)]
    found = [
        run(17_300, heard(words), replace(BATCHED, windows_together=n), track=talk(words, 17_300))[0]
        for n in (1, 2, 50)
    ]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    ("pauses", "cut"),
    [
        ([(100, 20), (300, 40), (500, 30)], 320),  # the longest
        ([(100, 40), (400, 40)], 420),  # the last of equals
        ([(200, 90), (450, 70)], 480),  # from 0.6 s on, all are equals; near the pause's begin
        ([(0, 50), (580, 20)], 25),  # at the edges, too
        ([(0, 600)], 30),  # nothing but a pause
    ],
)
def test_windows_are_cut_in_their_longest_pause(pauses, cut):
    features = np.random.default_rng(0).uniform(0.8, 1.0, (600, 4)).astype(np.float32)
    for begin, length in pauses:
        features[begin : begin + length] = -0.5
    assert abs(longest_pause(features) - cut) <= SMOOTHED


def test_without_a_pause_a_window_is_cut_where_it_is_quietest():
    features = np.full((600, 4), 0.9, np.float32)
    features[440:450] = 0.85
    assert 440 <= longest_pause(features) < 450


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), frames=st.integers(1, 7000))
def test_any_tokens_come_to_an_end_inside_the_audio(seed, frames):
    draw = np.random.default_rng(seed)
    scripts: dict[bytes, list[int]] = {}

    def script(encoder):
        return scripts.setdefault(encoder.digest, draw_tokens(draw, TOKENS))

    options = replace(BATCHED, max_new_tokens=12, log_prob_threshold=None, suppress_blank=False)
    transcript, found, _, _ = run(frames, scripted(script, TOKENS), options)
    ends = [done.end for done in found]
    assert ends == sorted(ends) and ends[-1] == frames / 100
    reached = 0.0
    for segment in transcript.segments:
        assert reached <= segment.start < segment.end <= frames / 100
        reached = segment.end
