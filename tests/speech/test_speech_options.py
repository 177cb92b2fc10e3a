"""Options: their checks, each naming the option."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cai_runtime.errors import TranscriptionError
from cai_runtime.speech.options import Options


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("task", "summarize"),
        ("task", 1),
        ("language", 5),
        ("languages", "en"),
        ("temperature", ()),
        ("temperature", "0"),
        ("temperature", (0.0, 3.0)),
        ("temperature", math.nan),
        ("beam_size", 0),
        ("beam_size", 2.5),
        ("beam_size", True),
        ("best_of", "5"),
        ("patience", 0),
        ("length_penalty", None),
        ("repetition_penalty", -1),
        ("no_repeat_ngram_size", -1),
        ("compression_ratio_threshold", "high"),
        ("log_prob_threshold", math.inf),
        ("condition_on_previous_text", 1),
        ("initial_prompt", 3),
        ("initial_prompt", [1.5]),
        ("initial_prompt", [-1]),
        ("suppress_tokens", "1,2"),
        ("suppress_tokens", [-2]),
        ("max_initial_timestamp", 31),
        ("max_new_tokens", 0),
        ("vad", "yes"),
        ("windows_together", 0),
        ("clip_timestamps", "a,b"),
        ("clip_timestamps", [5, 3]),
        ("clip_timestamps", [-1]),
        ("clip_timestamps", [math.nan]),
        ("seed", 0.5),
    ],
)
def test_a_wrong_value_is_refused_by_name(name, value):
    with pytest.raises(TranscriptionError) as error:
        Options(**{name: value})
    assert error.value.param == name
    assert name in str(error.value)


def test_values_become_plain():
    options = Options(
        temperature=np.float32(0),
        language=" EN ",
        suppress_tokens=[np.int64(-1), 7],
        vad=True,
        clip_timestamps="0, 10,20",
        initial_prompt=[1, 2],
    )
    assert options.temperature == (0.0,)
    assert options.language == "en"
    assert options.suppress_tokens == (-1, 7)
    assert options.vad == {}
    assert options.clips == [(0.0, 10.0), (20.0, math.inf)]
    assert options.initial_prompt == (1, 2)
    assert Options(language="auto").language is None
    assert Options().clips == [(0.0, math.inf)]


def test_silence_threshold_needs_word_times():
    with pytest.raises(TranscriptionError, match="word_timestamps") as error:
        Options(hallucination_silence_threshold=2.0)
    assert error.value.param == "hallucination_silence_threshold"
