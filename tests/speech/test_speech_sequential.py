"""Long form by a scripted model: where windows begin, what they are given, what is skipped, what comes out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import speech
from hypothesis import given, settings
from hypothesis import strategies as st
from speech import PLACE, FakeEngine, Track, WordTokenizer, draw_tokens, drive, place, scripted, small_tokens

from cai_runtime.errors import TranscriptionError
from cai_runtime.speech.options import Options
from cai_runtime.speech.prompts import SpeechText
from cai_runtime.speech.steps import Done
from cai_runtime.speech.transcriber import transcribe_steps

TOKENS = small_tokens()
MANY = small_tokens(("en", "de", "fr"))
T = TOKENS.timestamp_begin
GREEDY = Options(beam_size=1, temperature=0)


def run(frames, logits, options=GREEDY, tokens=TOKENS, track=None):
    """(transcript, what was done, engine, track) of audio with so many frames."""
    track = track or Track(frames)
    return *speech.run(logits, options, tokens, track), track


def spoken(words: list[tuple[int, int, int]], tokens=TOKENS):
    """A model that hears words (start frame, end frame, token): all that end within its window; of a word that does not,
    nothing but that it begins."""

    def script(encoder):
        begin, said, first = place(encoder), [], tokens.timestamp_begin
        for start, end, token in words:
            if start >= begin and start < begin + 3000:
                said += [first + (start - begin) // 2, token]
                if end > begin + 3000:
                    return said
                said += [first + (end - begin) // 2]
        return said

    return scripted(script, tokens)


def test_nothing_is_lost_between_windows():
    words = [(k * 400 + 60, k * 400 + 380, k % 90 + 1) for k in range(40)]
    transcript, found, _, track = run(16_100, spoken(words))
    assert [token for s in transcript.segments for token in s.tokens if token < TOKENS.eot] == [w[2] for w in words]
    assert [(s.start, s.end) for s in transcript.segments] == [(w[0] / 100, w[1] / 100) for w in words]
    assert [s.id for s in transcript.segments] == list(range(40))
    assert all(step < 3000 for step in np.diff(track.starts[:-1]))  # each window begins with the word that was cut
    assert transcript.text == "".join(s.text for s in transcript.segments)
    assert transcript.duration == 161.0
    assert [s for done in found for s in done.segments] == list(transcript.segments)
    assert found[-1].end == 161.0
    assert all(isinstance(done, Done) for done in found)


def test_text_before_is_the_prompt():
    words = [(0, 2000, 1), (2000, 3500, 2), (3500, 4000, 3)]
    _, _, engine, _ = run(4000, spoken(words), replace(GREEDY, initial_prompt="w7 w8"))
    prompts = [request.segments[1] for request in engine.requests if request.sampling.max_tokens > 1]
    assert prompts[0] == [TOKENS.sot_prev, 7, 8, TOKENS.sot]
    assert prompts[1] == [TOKENS.sot_prev, 7, 8, T, 1, T + 1000, TOKENS.sot]
    _, _, engine, _ = run(4000, spoken(words), replace(GREEDY, condition_on_previous_text=False, initial_prompt=[7]))
    prompts = [request.segments[1] for request in engine.requests if request.sampling.max_tokens > 1]
    assert prompts[:2] == [[TOKENS.sot_prev, 7, TOKENS.sot], [TOKENS.sot]]


@pytest.mark.parametrize("better", [True, False])
def test_sound_that_text_passes_over_is_heard_again_without_the_text_before(better):
    full = [(3000 + k * 100, 3000 + k * 100 + 100, [k % 90 + 1, 7, 8]) for k in range(20)]
    passed_over = [(3000, 5000, [5])]

    def saying(then):
        def script(encoder):
            begin = place(encoder)
            words = then if begin else [(0, 3000, [1] * 60)]
            return [t for start, end, ids in words for t in (T + (start - begin) // 2, *ids, T + (end - begin) // 2)]

        return scripted(script, TOKENS)

    with_text, without = saying(passed_over), saying(full if better else passed_over)

    def model(encoder, so_far, prompt):
        return (with_text if TOKENS.sot_prev in so_far else without)(encoder, so_far, prompt)

    transcript, _, engine, _ = run(5000, model, replace(GREEDY, compression_ratio_threshold=None))
    prompts = [request.segments[1] for request in engine.requests if request.sampling.max_tokens > 1]
    assert [TOKENS.sot_prev in ids for ids in prompts] == [False, True, False]
    heard = [(s.start, s.end) for s in transcript.segments]
    expected = full if better else passed_over
    assert heard == [(0.0, 30.0)] + [(start / 100, end / 100) for start, end, _ in expected]


def test_a_callers_prompt_is_not_taken_away_where_text_passes_over_sound():
    _, _, engine, _ = run(3000, spoken([(0, 2900, 1)]), replace(GREEDY, initial_prompt="w7"))
    decoded = [r.segments[1] for r in engine.requests if r.alignment is None]
    assert all(TOKENS.sot_prev in ids for ids in decoded if len(ids) > 1)


def test_prefix_belongs_to_the_first_window_and_hotwords_to_all():
    options = replace(GREEDY, prefix="w5", hotwords="w9")
    script = scripted(lambda encoder: [1, T + 1000, T + 1000, 2] if place(encoder) == 0 else [T, 2, T + 700], TOKENS)
    transcript, _, engine, _ = run(4000, script, options)
    assert [(s.text, s.start, s.end) for s in transcript.segments] == [(" w1", 0.0, 20.0), (" w2", 20.0, 34.0)]
    prompts = [request.segments[1] for request in engine.requests if request.sampling.max_tokens > 1]
    assert prompts[0] == [TOKENS.sot_prev, 9, TOKENS.sot, T, 5]
    assert prompts[1][:2] == [TOKENS.sot_prev, 9] and prompts[1][-1] == TOKENS.sot


def test_long_prompts_keep_room_for_the_transcript():
    options = replace(GREEDY, hotwords="w9 " * 150, initial_prompt="w7 " * 300 + "w8", prefix="w5 " * 300)
    _, _, engine, _ = run(1000, spoken([(0, 900, 1)]), options)
    request = engine.requests[0]
    prompt = request.segments[1]
    assert prompt[: prompt.index(TOKENS.sot)] == [TOKENS.sot_prev] + [9] * 150 + [7] * 72 + [8]
    assert len(prompt) + request.sampling.max_tokens == TOKENS.max_context
    assert request.sampling.max_tokens > 100


def test_text_of_a_control_token_is_no_control_token(whisper_dir):
    from tokenizers import Tokenizer

    from cai_runtime.speech.tokens import SpeechTokens

    tokens = SpeechTokens.from_checkpoint(whisper_dir)
    text = SpeechText(Tokenizer.from_file(str(whisper_dir / "tokenizer.json")), tokens)
    for name in ("<|startoftranscript|>", "<|0.00|>", "<|endoftext|>", "<<|en|>"):
        ids = text.encode(f" say {name} now")
        assert max(ids) < tokens.eot
        assert text.decode(ids) == f" say {name} now"
    assert text.decode([tokens.sot, *ids, tokens.timestamp_begin, tokens.eot]) == " say <<|en|> now"


def test_silence_is_skipped_unless_the_text_is_likely():
    logits = spoken([(at, at + 80, at // 90 + 1) for at in range(0, 2900, 90)])

    def silent(encoder, so_far, prompt):
        row = logits(encoder, so_far, prompt) * (0.1 if len(so_far) > prompt else 1)
        if so_far[-1] == TOKENS.sot:
            row = row.copy()
            row[TOKENS.no_speech] = 40.0
        return row

    transcript, found, _, _ = run(3000, silent)
    assert transcript.segments == ()
    assert {done.end for done in found} == {30.0}
    transcript, _, _, _ = run(3000, silent, replace(GREEDY, no_speech_threshold=None))
    assert len(transcript.segments) == 33 and transcript.segments[0].no_speech_prob > 0.9
    transcript, _, _, _ = run(3000, silent, replace(GREEDY, log_prob_threshold=-99.0))
    assert len(transcript.segments) == 33


def test_without_timestamps_windows_follow_each_other():
    logits = scripted(lambda encoder: [place(encoder) // 3000 + 1], TOKENS)
    transcript, _, engine, track = run(7000, logits, replace(GREEDY, without_timestamps=True))
    assert [(s.start, s.end, s.text) for s in transcript.segments] == [
        (0.0, 30.0, " w1"), (30.0, 60.0, " w2"), (60.0, 70.0, " w3")
    ]  # fmt: skip
    assert engine.requests[0].segments[1] == [TOKENS.sot, TOKENS.no_timestamps]
    assert track.starts == [0, 3000, 6000, 7000]


def test_clips_alone_are_heard():
    words = [(k * 100, k * 100 + 90, k % 90 + 1) for k in range(60)]
    options = replace(GREEDY, clip_timestamps="5,10,20")
    _, _, _, track = run(6000, spoken(words), options)
    assert track.starts[:2] == [500, 2000]
    engine = FakeEngine(spoken(words), TOKENS.eot)
    for _ in drive(transcribe_steps(Track(6000), TOKENS, options, SpeechText(WordTokenizer(), TOKENS)), engine):
        pass
    clip = engine.requests[0].segments[0].features
    assert round(clip[499, -1] / PLACE) == 999 and (clip[500:, -1] == clip.min()).all()


@pytest.mark.parametrize("frames", [0, 1, 37, 2999, 3000, 3001])
def test_audio_of_any_length(frames):
    transcript, _, _, _ = run(frames, spoken([(0, frames, 1)]) if frames else spoken([]))
    assert transcript.duration == frames / 100
    assert len(transcript.segments) == (frames > 0)


def test_language_is_detected_once():
    logits = spoken([(0, 2900, 1), (3000, 5900, 2)], MANY)

    def german(encoder, so_far, prompt):
        row = logits(encoder, so_far, prompt)
        if so_far[-1] == MANY.sot:
            row = row.copy()
            row[MANY.languages["de"]], row[MANY.languages["fr"]] = 3.0, 2.0
        return row

    transcript, _, engine, _ = run(6000, german, tokens=MANY)
    assert transcript.language == "de"
    assert transcript.language_probability == pytest.approx(1 / (1 + np.exp(-1) + np.exp(-3)), abs=1e-6)
    probes = [r for r in engine.requests if r.sampling.max_tokens == 1]
    assert len(probes) == 4  # one for the language, one an attempt for whether there is speech
    assert engine.requests[1].segments[1] == [MANY.sot, MANY.languages["de"], MANY.transcribe]
    transcript, _, engine, _ = run(3000, german, replace(GREEDY, languages=("en", "fr")), tokens=MANY)
    assert transcript.language == "fr"
    transcript, _, engine, _ = run(3000, german, replace(GREEDY, language="en", task="translate"), tokens=MANY)
    assert (transcript.language, transcript.language_probability, transcript.task) == ("en", 1.0, "translate")
    assert engine.requests[0].segments[1] == [MANY.sot, MANY.languages["en"], MANY.translate]


@pytest.mark.parametrize(
    ("options", "param"),
    [
        (Options(task="translate"), "task"),
        (Options(language="de"), "language"),
        (Options(languages=("en", "de")), "languages"),
        (Options(initial_prompt=[TOKENS.sot]), "initial_prompt"),
        (Options(suppress_tokens=[TOKENS.vocabulary]), "suppress_tokens"),
    ],
)
def test_what_the_model_lacks_is_refused_at_once(options, param):
    with pytest.raises(TranscriptionError) as error:
        transcribe_steps(Track(100), TOKENS, options, SpeechText(WordTokenizer(), TOKENS))
    assert error.value.param == param


@settings(max_examples=1000, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), frames=st.integers(1, 7000), ruled=st.booleans())
def test_any_tokens_come_to_an_end_inside_the_audio(seed, frames, ruled):
    """Random tokens, as the rules allow them or as no rules would: every window ends, times rise and stay inside."""
    draw = np.random.default_rng(seed)
    scripts: dict[int, list[int]] = {}

    def script(encoder):
        return scripts.setdefault(place(encoder), draw_tokens(draw, TOKENS))

    options = replace(GREEDY, temperature=0, max_new_tokens=12, log_prob_threshold=None, without_timestamps=not ruled)
    tokens = replace(TOKENS, begin_suppress_tokens=())
    transcript, found, _, track = run(frames, scripted(script, tokens), options, tokens)
    assert len(track.starts) <= frames + 1
    ends = [done.end for done in found]
    assert ends == sorted(ends) and ends[-1] == frames / 100
    reached = 0.0
    for segment in transcript.segments:
        assert reached <= segment.start < segment.end <= frames / 100
        assert segment.text.strip()
        reached = segment.end
    assert transcript.text == "".join(segment.text for segment in transcript.segments)
