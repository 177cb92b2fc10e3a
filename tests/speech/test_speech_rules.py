"""The rules of the next token, against transformers' logits processors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from speech import WORDS, small_tokens

from cai_runtime.speech.options import Options
from cai_runtime.speech.rules import rules_for

TOKENS = small_tokens(("en", "de"), positions=40)
FIRST = TOKENS.timestamp_begin
LIKELY = st.sampled_from(["flat", "times", "text"])


def transformers_rules(options: Options):
    """The same rules as a function (row, generated) -> row, by transformers."""
    import torch
    from transformers import GenerationConfig
    from transformers.generation.logits_process import (
        SuppressTokensAtBeginLogitsProcessor,
        SuppressTokensLogitsProcessor,
        WhisperTimeStampLogitsProcessor,
    )

    config = GenerationConfig(eos_token_id=TOKENS.eot)
    config.no_timestamps_token_id = TOKENS.no_timestamps
    config.max_initial_timestamp_index = round(options.max_initial_timestamp / 0.02)
    chain = [SuppressTokensLogitsProcessor(list(TOKENS.controls))]
    if options.suppress_blank:
        chain.append(SuppressTokensAtBeginLogitsProcessor(list(TOKENS.begin_suppress_tokens), 1))
    if not options.without_timestamps:
        chain.append(WhisperTimeStampLogitsProcessor(config, begin_index=1))

    def apply(row: np.ndarray, generated: list[int]) -> np.ndarray:
        ids, scores = torch.tensor([[TOKENS.sot, *generated]]), torch.tensor(row)[None]
        for processor in chain:
            scores = processor(ids, scores)
        return scores[0].numpy()

    return apply


@settings(max_examples=400, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    generated=st.lists(st.one_of(st.integers(0, WORDS - 1), st.integers(FIRST, FIRST + 40)), max_size=12),
    likely=LIKELY,
    initial=st.sampled_from([0.0, 0.3, 0.8]),
    blank=st.booleans(),
    plain=st.booleans(),
)
def test_rules_equal_transformers(seed, generated, likely, initial, blank, plain):
    options = Options(max_initial_timestamp=initial, suppress_blank=blank, without_timestamps=plain)
    row = np.random.default_rng(seed).standard_normal(TOKENS.vocabulary).astype(np.float32)
    row[FIRST:] += {"flat": 0.0, "times": 2.0, "text": -6.0}[likely]
    expected = transformers_rules(options)(row, generated)
    rules_for(TOKENS, options)(row, generated)
    np.testing.assert_array_equal(row, expected)


def row_of(**logits: float) -> np.ndarray:
    """Zeros but for the given logits, named by kind and number: w3 a text token, t5 a time, eot."""
    row = np.zeros(TOKENS.vocabulary, np.float32)
    for name, logit in logits.items():
        at = TOKENS.eot if name == "eot" else {"w": 0, "t": FIRST}[name[0]] + int(name[1:])
        row[at] = logit
    return row


def best(row: np.ndarray, generated: list[int], lead: tuple[int, ...] = (), **options) -> int:
    rules_for(TOKENS, Options(**options), lead)(row, generated)
    return int(row.argmax())


def test_times_together_outweigh_a_likelier_word():
    row = row_of(w3=3.0)
    row[FIRST:] = 2.0
    assert best(row, [FIRST, 7]) >= FIRST  # 40 times of e^2 are likelier than one word of e^3
    row = row_of(w3=7.0)
    row[FIRST:] = 2.0
    assert best(row, [FIRST, 7]) == 3


def test_a_window_that_is_heard_whole_does_not_end_behind_a_pair_of_times():
    def best_of(generated, whole):
        row = row_of(eot=9.0, w3=5.0)
        rules_for(TOKENS, Options(), whole=whole)(row, generated)
        return int(row.argmax())

    pair = [FIRST, 7, FIRST + 5, FIRST + 5]
    assert best_of(pair, 6) == 3
    assert best_of(pair, 5) == TOKENS.eot  # what is left holds no word
    assert best_of(pair, 0) == TOKENS.eot
    assert best_of(pair[:-1], 6) == TOKENS.eot  # behind a single time, nothing was heard
    assert best_of([FIRST], 6) == TOKENS.eot  # a window may hold no speech


def test_a_prefix_counts_as_the_transcripts_beginning():
    lead = (FIRST, 7, 8)
    assert best(row_of(w3=9.0), [], lead) == 3
    assert best(row_of(t2=9.0), [9], (FIRST + 5, 7)) != FIRST + 2  # times do not fall
    assert best(row_of(w3=9.0), []) == FIRST  # without a prefix, a time comes first


def test_repetition_penalty_leaves_times_alone():
    row = row_of(w3=2.0, w4=-2.0, t9=2.0)
    rules_for(TOKENS, Options(repetition_penalty=2.0, without_timestamps=True))(row, [FIRST + 9, 3, 4, FIRST + 9])
    assert (row[3], row[4], row[FIRST + 9]) == (1.0, -4.0, 2.0)


def test_no_ngram_comes_twice_across_segments():
    generated = [FIRST, 3, 4, 5, FIRST + 9, FIRST + 9, 3, 4]
    assert best(row_of(w5=9.0, w6=8.0), generated, no_repeat_ngram_size=3) == 6
    assert best(row_of(w5=9.0, w6=8.0), generated, no_repeat_ngram_size=4) == 5


def test_control_tokens_never_come_whatever_the_caller_lifts():
    row = np.zeros(TOKENS.vocabulary, np.float32)
    row[list(TOKENS.controls)] = 9.0
    assert best(row, [FIRST], suppress_tokens=()) not in TOKENS.controls


def test_callers_list_joins_the_checkpoints_or_takes_its_place():
    tokens = small_tokens(suppress_tokens=(5, 10**6), positions=40)

    def banned(*ids: int) -> set[int]:
        row = np.zeros(tokens.vocabulary, np.float32)
        rules_for(tokens, Options(suppress_tokens=ids, without_timestamps=True))(row, [1])
        return set(np.flatnonzero(np.isneginf(row[:WORDS])).tolist())

    assert banned(-1) == {5}  # the id that the vocabulary lacks is passed over
    assert banned(-1, 6) == {5, 6}
    assert banned(6) == {6}
    assert banned() == set()


def test_what_a_padded_vocabulary_has_behind_the_times_never_comes():
    row = np.zeros(TOKENS.vocabulary + 7, np.float32)
    row[-7:] = 99.0
    assert best(row, [FIRST, 3]) < len(row) - 7


def test_a_loop_ends_the_text():
    said = [FIRST, 1, *[3, 4] * 11]
    assert best(row_of(w3=9.0), said) == TOKENS.eot
    assert best(row_of(w3=9.0), [*said[:-1], 5]) == 3
    assert best(row_of(w3=9.0), said, compression_ratio_threshold=None) == 3


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_stay_so(value):
    row = row_of(w3=value)
    rules_for(TOKENS, Options())(row, [FIRST, 7])
    assert not np.isfinite(row[3]) and not np.isneginf(row[3])
