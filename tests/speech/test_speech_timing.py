"""What the cross-attention says of a window: words in their places, invented text left out. Not asked for without need."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import speech
from speech import FakeEngine, Track, moving, place, resting, scripted, small_tokens

from cai_runtime.speech.options import Options

TOKENS = small_tokens(alignment_heads=((0, 0), (0, 1), (1, 0)))
T = TOKENS.timestamp_begin
MODES = pytest.mark.parametrize("batched", [False, True])
FIRST, SECOND = range(1, 21), range(21, 41)  # words
SAID = [T, *FIRST, T + 750, T + 750, *SECOND, T + 1495]


def spoken(words):
    return [f" w{word}" for word in words]


def run(options, *, batched=False, attention=moving, sure=20.0, no_speech=0.0, said=SAID, frames=2990):
    logits = scripted(lambda encoder: said if place(encoder) == 0 else [], TOKENS, sure)

    def heard(encoder, so_far, prompt):
        row = logits(encoder, so_far, prompt).copy()
        if row.argmax() < TOKENS.eot:
            row[T:] = -20.0  # what it is unsure of is the word
        if so_far[-1] == TOKENS.sot:
            row[TOKENS.no_speech] = no_speech
        return row

    engine = FakeEngine(heard, TOKENS.eot, attention=attention)
    options = replace(options, beam_size=1, temperature=0, batched=batched)
    transcript, _, _ = speech.run(None, options, TOKENS, Track(frames), engine=engine)
    return transcript, [request for request in engine.requests if request.alignment is not None]


@MODES
def test_words_lie_in_their_segments(batched):
    transcript, asked = run(Options(word_timestamps=True), batched=batched)
    assert [(s.text, [w.word for w in s.words]) for s in transcript.segments] == [
        ("".join(spoken(words)), spoken(words)) for words in (FIRST, SECOND)
    ]
    assert [(s.words[0].start, s.words[-1].end) for s in transcript.segments] == [
        (s.start, s.end) for s in transcript.segments
    ]
    times = [time for word in transcript.words for time in (word.start, word.end)]
    assert times == sorted(times) and times[0] >= 0 and times[-1] <= 29.9
    assert all(word.probability > 0.99 for word in transcript.words)
    assert [r.segments[1] for r in asked] == [[TOKENS.sot, TOKENS.no_timestamps, *FIRST, *SECOND]]
    assert (asked[0].alignment.heads, asked[0].alignment.count) == (TOKENS.alignment_heads, 42)
    assert asked[0].sampling.max_tokens == 0


def test_a_prefix_takes_its_part_of_the_audio_and_has_no_words():
    options = Options(word_timestamps=True, prefix="w9 w10")
    transcript, asked = run(options, said=[1, 2, 3, 4, T + 500])
    assert asked[0].segments[1] == [TOKENS.sot, TOKENS.no_timestamps, 9, 10, 1, 2, 3, 4]
    assert [word.word for word in transcript.words] == [" w1", " w2", " w3", " w4"]


def test_the_next_window_begins_behind_the_last_word():
    track_starts = []

    class Seen(Track):
        def features(self, start):
            track_starts.append(start)
            return super().features(start)

    engine = FakeEngine(scripted(lambda encoder: [T, 1, 2, 3, T + 1400, T + 1400], TOKENS), TOKENS.eot)
    options = Options(word_timestamps=True, beam_size=1, temperature=0)
    transcript, _, _ = speech.run(None, options, TOKENS, Seen(4000), engine=engine)
    assert track_starts[1] == round(transcript.segments[0].end * 100) < 2800


@MODES
def test_likely_text_is_not_looked_at(batched):
    assert run(Options(), batched=batched)[1] == []


UNSURE = {"sure": 3.0}  # a mean log probability of about -1.8
SILENT = {"no_speech": 40.0}  # likely text where the model hears no speech


@MODES
@pytest.mark.parametrize("signs", [UNSURE, SILENT])
def test_suspicious_text_stays_where_its_attention_follows_the_audio(batched, signs):
    transcript, asked = run(Options(), batched=batched, **signs)
    assert len(asked) == 1 and len(transcript.segments) == 2


@MODES
@pytest.mark.parametrize("signs", [UNSURE, SILENT])
def test_suspicious_text_goes_where_its_attention_rests(batched, signs):
    transcript, asked = run(Options(), batched=batched, attention=resting, **signs)
    assert len(asked) == 1 and transcript.segments == ()
    transcript, _ = run(Options(word_timestamps=True), batched=batched, attention=resting, **signs)
    assert transcript.segments == () and transcript.words == ()


FEW = [T, 1, T + 1495]  # a word over 30 s that sound


@MODES
def test_a_word_over_sound_goes_where_the_model_hears_no_speech(batched):
    assert len(run(Options(), batched=batched, said=FEW)[0].segments) == 1
    assert run(Options(), batched=batched, said=FEW, **SILENT)[0].segments == ()
    options = Options(no_speech_threshold=None)
    assert len(run(options, batched=batched, said=FEW, **SILENT)[0].segments) == 1


def test_callers_who_switch_the_thresholds_off_get_all_text():
    options = Options(no_speech_threshold=None, log_prob_threshold=None)
    for signs in (UNSURE, SILENT):
        transcript, asked = run(options, attention=resting, **signs)
        assert asked == [] and len(transcript.segments) == 2


def test_invented_text_over_silence_is_dropped_and_heard_again():
    """Words in a burst at 10 s, silence around them."""

    def burst(request):
        weights = np.full((1, request.alignment.count, 1500), 1e-5, np.float32)
        weights[:, :, 500:506] = 1
        return weights / weights.sum(-1, keepdims=True)

    said = [T, 1, T + 1490]
    options = Options(word_timestamps=True, log_prob_threshold=None, no_speech_threshold=None)
    transcript, _ = run(options, attention=burst, sure=7.0, said=said, frames=2990)
    assert len(transcript.segments) == 1
    transcript, _ = run(
        replace(options, hallucination_silence_threshold=2.0), attention=burst, sure=7.0, said=said, frames=2990
    )
    assert transcript.segments == ()
