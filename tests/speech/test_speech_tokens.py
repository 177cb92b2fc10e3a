"""Control tokens from a checkpoint's files, whichever of them there are."""

from __future__ import annotations

import json

import pytest

from cai_runtime.errors import InvalidConfigError, MissingFileError, TranscriptionError
from cai_runtime.speech.tokens import SpeechTokens

CODES = ("en", "zh", "de", "haw", "yue")
TASKS = ("translate", "transcribe", "startoflm", "startofprev", "nospeech", "notimestamps")


def names_from(first: int, codes=CODES, last_names=TASKS) -> dict[str, int]:
    """Added tokens in OpenAI's order, the first of them at `first`."""
    order = ["endoftext", "startoftranscript", *codes, *last_names, *(f"{k / 50:.2f}" for k in range(1501))]
    return {f"<|{name}|>": first + i for i, name in enumerate(order)}


def write(path, names=None, generation=None, config=None):
    if names is not None:
        added = [{"id": at, "content": name, "special": True} for name, at in names.items()]
        (path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    for name, value in (("generation_config.json", generation), ("config.json", config)):
        if value is not None:
            (path / name).write_text(json.dumps(value))
    return path


def test_tiny_en(whisper_dir):
    tokens = SpeechTokens.from_checkpoint(whisper_dir)
    assert (tokens.eot, tokens.sot, tokens.sot_prev) == (50256, 50257, 50360)
    assert (tokens.no_speech, tokens.no_timestamps, tokens.timestamp_begin) == (50361, 50362, 50363)
    assert not tokens.is_multilingual
    assert tokens.begin_suppress_tokens == (220, 50256)
    assert len(tokens.suppress_tokens) == 90
    assert tokens.alignment_heads == tuple((layer, head) for layer in (1, 2, 3) for head in range(6))
    assert (tokens.max_context, tokens.positions, tokens.mels) == (448, 1500, 80)
    assert tokens.start("en", "transcribe") == [50257]


def test_ids_are_read_and_never_assumed(tmp_path):
    """large-v3 has a language more than the models before it; a config without lists, and no config.json."""
    names = names_from(50257)
    generation = {
        "is_multilingual": True,
        "decoder_start_token_id": names["<|startoftranscript|>"],
        "eos_token_id": names["<|endoftext|>"],
        "no_timestamps_token_id": names["<|notimestamps|>"],
        "lang_to_id": {f"<|{code}|>": names[f"<|{code}|>"] for code in CODES},
        "task_to_id": {"translate": names["<|translate|>"], "transcribe": names["<|transcribe|>"]},
    }
    tokens = SpeechTokens.from_checkpoint(write(tmp_path, names, generation))
    assert tokens.languages == {code: 50259 + i for i, code in enumerate(CODES)}
    assert tokens.start("yue", "translate") == [50258, 50263, names["<|translate|>"]]
    assert tokens.sot_prev == names["<|startofprev|>"]
    assert tokens.no_speech == names["<|nospeech|>"]
    assert tokens.timestamp_begin == names["<|0.00|>"]
    assert tokens.suppress_tokens == ()


def test_the_tokenizer_alone_is_enough(tmp_path):
    names = names_from(7, last_names=[name.replace("nospeech", "nocaptions") for name in TASKS])
    tokens = SpeechTokens.from_checkpoint(write(tmp_path, names, config={"vocab_size": 51866}))
    assert (tokens.eot, tokens.sot) == (7, 8)
    assert tokens.no_speech == names["<|nocaptions|>"]
    assert list(tokens.languages) == list(CODES)
    assert tokens.transcribe == names["<|transcribe|>"]


def test_a_generation_config_alone_is_enough(tmp_path):
    generation = {"decoder_start_token_id": 2, "eos_token_id": [1], "prev_sot_token_id": 3, "no_timestamps_token_id": 5}
    tokens = SpeechTokens.from_checkpoint(write(tmp_path, generation={**generation, "is_multilingual": False}))
    assert (tokens.eot, tokens.no_speech, tokens.timestamp_begin) == (1, 4, 6)
    assert not tokens.is_multilingual


def test_an_english_only_tokenizer_names_languages_all_the_same(tmp_path):
    tokens = SpeechTokens.from_checkpoint(write(tmp_path, names_from(50256), config={"vocab_size": 51864}))
    assert tokens.languages == {}


def test_heads_of_words(tmp_path):
    """A deep decoder's are those that its checkpoint names; without sizes there are no others."""
    sizes = {"vocab_size": 100, "decoder_layers": 24, "decoder_attention_heads": 2}
    named = {"is_multilingual": False, "alignment_heads": [[3, 1]]}
    tokens = SpeechTokens.from_checkpoint(write(tmp_path, names_from(7), named, sizes))
    assert tokens.alignment_heads == ((3, 1),)
    assert SpeechTokens.from_checkpoint(write(tmp_path, names_from(7), named, {})).alignment_heads == ((3, 1),)
    assert SpeechTokens.from_checkpoint(write(tmp_path, names_from(7), {}, {})).alignment_heads == ()


def test_without_named_heads_the_upper_layers_align(tmp_path):
    sizes = {"vocab_size": 100, "decoder_layers": 4, "decoder_attention_heads": 2}
    tokens = SpeechTokens.from_checkpoint(write(tmp_path, names_from(7), config=sizes))
    assert tokens.alignment_heads == tuple((layer, head) for layer in (1, 2, 3) for head in (0, 1))


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(MissingFileError):
        SpeechTokens.from_checkpoint(tmp_path)
    names = names_from(7)
    del names["<|startofprev|>"]
    with pytest.raises(InvalidConfigError, match=r"<\|startofprev\|>.*prev_sot_token_id"):
        SpeechTokens.from_checkpoint(write(tmp_path, names))
    many = {"is_multilingual": True}
    with pytest.raises(InvalidConfigError, match="languages"):
        SpeechTokens.from_checkpoint(write(tmp_path, names_from(7, codes=()), generation=many))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("eos_token_id", "end"),
        ("no_timestamps_token_id", -1),
        ("suppress_tokens", 5),
        ("suppress_tokens", [1, "a"]),
        ("alignment_heads", [[1]]),
        ("lang_to_id", []),
        ("task_to_id", {"transcribe": 1.5}),
        ("task_to_id", [1]),
    ],
)
def test_a_malformed_value_is_named(tmp_path, key, value):
    generation = {"is_multilingual": True, key: value}
    with pytest.raises(InvalidConfigError, match=key if key != "task_to_id" else "transcribe|task_to_id"):
        SpeechTokens.from_checkpoint(write(tmp_path, names_from(7), generation))


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_an_unreadable_file_is_named(tmp_path, text):
    (tmp_path / "generation_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InvalidConfigError, match=r"generation_config\.json"):
        SpeechTokens.from_checkpoint(tmp_path)


def test_languages_and_tasks_that_a_model_lacks_are_named(whisper_dir, tmp_path):
    english = SpeechTokens.from_checkpoint(whisper_dir)
    with pytest.raises(TranscriptionError, match="English-only") as error:
        english.start("en", "translate")
    assert (error.value.param, error.value.capability) == ("task", "translation")
    with pytest.raises(TranscriptionError, match="English-only"):
        english.start("de", "transcribe")
    many = SpeechTokens.from_checkpoint(write(tmp_path, names_from(7), config={"vocab_size": 51865}))
    with pytest.raises(TranscriptionError, match="'xx'.*de, en") as error:
        many.start("xx", "transcribe")
    assert error.value.param == "language"
