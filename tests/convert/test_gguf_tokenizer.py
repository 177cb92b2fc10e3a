"""Tokenizers built from GGUF metadata, against transformers and against sentencepiece's own way of merging."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import transformers
from packaging.version import Version
from transformers import AutoTokenizer

from cai_runtime.convert.gguf_tokenizer import build_tokenizer
from cai_runtime.convert.sources import fetch_file
from cai_runtime.errors import ConversionError

TEXT = "the quick brown fox jumps over the lazy dog and then the other dogs jump over the brown foxes too"
WORDS = TEXT.split(" ")


def described(**metadata) -> SimpleNamespace:
    """What `build_tokenizer` reads of a GGUF file."""
    return SimpleNamespace(path="x.gguf", metadata={f"tokenizer.ggml.{key}": value for key, value in metadata.items()})


def sentencepiece_vocabulary() -> tuple[list[str], list[float], list[int]]:
    """<unk>, <s>, </s>, 256 bytes, and pieces of English words with distinct scores, longer and commoner ones first."""
    counts: dict[str, int] = {}
    for word in WORDS:
        piece = "▁" + word
        for start in range(len(piece)):
            for end in range(start + 2, min(start + 6, len(piece)) + 1):
                counts[piece[start:end]] = counts.get(piece[start:end], 0) + 1
    pieces = sorted(counts, key=lambda piece: (-counts[piece], len(piece), piece))
    letters = sorted({letter for word in WORDS for letter in word} | {"▁"})
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *letters]
    types = [2, 3, 3] + [6] * 256 + [1] * (len(pieces) + len(letters))
    return tokens, [0.0] * 259 + [-float(i) for i in range(len(pieces) + len(letters))], types


def merge_like_sentencepiece(text: str, scores: dict[str, float]) -> list[str]:
    """Join the two neighbours that make the best-scored piece, until none do."""
    symbols = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [(scores[a + b], -i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in scores]
        if not pairs:
            return symbols
        at = -max(pairs)[1]
        symbols[at : at + 2] = ["".join(symbols[at : at + 2])]


def test_sentencepiece_pieces_follow_the_scores():
    tokens, scores, types = sentencepiece_vocabulary()
    file = described(model="llama", tokens=tokens, scores=scores, token_type=types, bos_token_id=1, eos_token_id=2)
    tokenizer = build_tokenizer(file)
    by_piece = dict(zip(tokens[259:], scores[259:], strict=True))
    for text in [" ".join(WORDS), "dogs", "foxes jump", "then other lazy the", "  two  blanks", "brownest thethe"]:
        if set(text) - set("".join(WORDS) + " "):
            continue
        assert tokenizer.encode(text, add_special_tokens=False).tokens == merge_like_sentencepiece(text, by_piece)
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_sentencepiece_begins_with_bos_and_falls_back_to_bytes():
    tokens, scores, types = sentencepiece_vocabulary()
    file = described(model="llama", tokens=tokens, scores=scores, token_type=types, bos_token_id=1, eos_token_id=2)
    tokenizer = build_tokenizer(file)
    encoded = tokenizer.encode("dog ü</s>fox")
    assert encoded.tokens[0] == "<s>"
    assert "<0xC3>" in encoded.tokens
    assert "</s>" in encoded.tokens
    assert encoded.tokens[encoded.tokens.index("</s>") + 1].startswith("▁"), (
        "the space prefix comes after a special token too"
    )
    assert tokenizer.decode(encoded.ids, skip_special_tokens=True) == "dog ü fox"


def test_qwens_tokenizer_normalizes_and_shows_the_tokens_of_infill():
    tokens = ["a", "e", "Ì", "ģ", "Ã", "©", "Ã©", "<|fim_prefix|>", "<|im_end|>", "[PAD9]"]
    file = described(model="gpt2", pre="qwen2", tokens=tokens, token_type=[1] * 7 + [3, 3, 5], merges=["Ã ©"])
    tokenizer = build_tokenizer(file)
    assert tokenizer.encode("e\u0301a").tokens == ["Ã©", "a"], "in normalization form C"
    assert tokenizer.decode([7, 0, 8], skip_special_tokens=True) == "<|fim_prefix|>a"
    assert tokenizer.get_vocab_size() == 9, "what fills the embedding up is no token"


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"model": "bert"}, "tokenizer 'bert'"),
        ({"model": "gpt2", "pre": "someone-elses", "merges": []}, "someone-elses"),
        ({"model": "gpt2", "merges": []}, "splitting rule None"),
        ({"model": "gpt2", "pre": "gpt-2"}, "merges is missing"),
        ({"model": "gpt2", "pre": "gpt-2", "merges": ["a b c"]}, "'a b c'"),
        ({"model": "gpt2", "pre": "gpt-2", "merges": ["a z"]}, "don't fit"),
        ({"model": "llama"}, "scores"),
        ({"model": "llama", "scores": [0.0, 0.0], "token_type": [1]}, "2 tokens but 1 token types"),
        ({"model": "llama", "scores": [0.0, 0.0], "bos_token_id": 9}, "bos_token_id 9"),
    ],
    ids=["model", "unknown-rule", "no-rule", "no-merges", "bad-merge", "foreign-merge", "scores", "types", "bos"],
)
def test_what_can_not_be_built_is_named(metadata, message):
    with pytest.raises(ConversionError, match=message):
        build_tokenizer(described(tokens=["a", "b"], **metadata))


def test_smollm2_text_comes_back_and_numbers_are_split(smollm2_dir, wikipedia_texts):
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    for article in wikipedia_texts[::10]:
        ids = tokenizer(article[:20000]).input_ids
        assert tokenizer.decode(ids) == article[:20000]
        assert max(ids) < 49152
    # As llama.cpp cuts them with this file.
    assert tokenizer(" ½½").input_ids == [216, 16738, 16738]
    assert tokenizer("<|im_start|>user\nyear 1989 and 42").input_ids == [
        *[1, 4093, 198, 3610, 216, 33, 41, 40, 41, 284, 216, 36, 34]
    ]


@pytest.mark.slow
def test_smollm2_agrees_with_transformers(smollm2_dir, wikipedia_texts):
    ours = AutoTokenizer.from_pretrained(smollm2_dir)
    source = fetch_file("smollm2-135m-instruct")
    theirs = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    assert ours.get_vocab() == theirs.get_vocab()
    # As the file says. (transformers 5.17 takes <|im_start|> for the end of a text, 5.24 does not.)
    assert (ours.bos_token, ours.eos_token) == ("<|im_start|>", "<|im_end|>")
    if Version(transformers.__version__) >= Version("5.24"):
        assert ours.special_tokens_map == theirs.special_tokens_map
        assert ours.all_special_ids == theirs.all_special_ids
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    for turns in (chat, chat[1:]):
        template = {"tokenize": False, "add_generation_prompt": True}
        assert ours.apply_chat_template(turns, **template) == theirs.apply_chat_template(turns, **template)
    for article in wikipedia_texts:
        # Numbers set apart: transformers doesn't know this vocabulary's rule for them.
        text = "".join(letter for letter in article[:4000] if not letter.isnumeric())
        assert ours(text).input_ids == theirs(text).input_ids
