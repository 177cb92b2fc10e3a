"""Pieces that add up to the tokenizer's own text, and stop strings that never leak."""

import codecs
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from cai_runtime.engine.detokenizer import Detokenizer, StopStrings, TokenDecoder

TEXTS = [
    "Hello world, this is a test.\n\n  Indented text,\ttabs\r\nand  double spaces.",
    "naïve café — “quotes” … ½ × ∞",
    "日本語のテキストと中文文本。한국어도 있습니다.",
    "🙂👍🏽👨‍👩‍👧‍👦🇪🇸 emoji with joiners",
    "שלום עולם مرحبا بالعالم हिन्दी ไทย",
    "\ufffd a real replacement character \ufffd\ufffd\ufffd",
    "def f(x):\n    return x ** 2  # ' . , ! do n't 's\n",
    "<|im_start|>user\nhi<|im_end|>",
    "",
    " ",
    "e\u0301 combining \u200b zero width \u0000 null",
]


def byte_level():
    """Byte-level BPE, as in GPT-2, Llama 3 and SmolLM2; few merges, so that characters are split over tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 2, trainer)
    return tokenizer


def sentencepiece_like(decoder):
    """A vocabulary with word-initial spaces and byte fallback, as in Llama 2 and Mistral 7B."""
    vocab = {"<unk>": 0, "<s>": 1}
    vocab |= {f"<0x{byte:02X}>": byte + 2 for byte in range(256)}
    for piece in ["▁", "▁▁", "▁Hello", "▁world", "Hello", "a", "b", "é", "日", ",", "▁a", "▁\ufffd", "\n"]:
        vocab[piece] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.decoder = decoder
    return tokenizer


TOKENIZERS = {
    "byte-level": byte_level,
    "llama": lambda: sentencepiece_like(
        decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    ),
    "metaspace": lambda: sentencepiece_like(
        decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    ),
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def pieces_of(decoder, token_ids, skip, prompt_ids=()):
    """The emitted pieces, the last one from finish()."""
    detokenizer = Detokenizer(decoder, prompt_ids, skip_special_tokens=skip)
    pieces = [detokenizer.feed(token_id) for token_id in token_ids]
    return [*pieces, detokenizer.finish()]


def _replace_one_byte(error):
    return "\ufffd", error.start + 1


codecs.register_error("replace_one_byte", _replace_one_byte)


def text_of(decoder, token_ids, skip):
    """The tokenizer's own text, but for runs of byte tokens with an invalid byte in them: their valid characters stay.

    Each run is decoded once with its invalid bytes out of the way, as a character that occurs nowhere else.
    """
    ids = [token_id for token_id in token_ids if not (skip and decoder.is_special(token_id))]
    byte_id = {decoder.byte_of(i): i for i in range(258) if decoder.byte_of(i) is not None}
    whole, run = [], b""
    for token_id in [*ids, None]:
        byte = None if token_id is None else decoder.byte_of(token_id)
        if byte is not None:
            run += bytes([byte])
            continue
        mended = run.decode("utf-8", "replace_one_byte").encode()
        whole += [byte_id[b] for b in mended]
        run = b""
        whole += [] if token_id is None else [token_id]
    return decoder.decode(whole, skip)


def check(decoder, token_ids, skip):
    pieces = pieces_of(decoder, token_ids, skip)
    assert "".join(pieces) == text_of(decoder, token_ids, skip), token_ids


@pytest.mark.parametrize("skip", [True, False])
def test_pieces_of_random_tokens_add_up_to_the_text(tokenizer, skip):
    decoder, rng = TokenDecoder(tokenizer), random.Random(0)
    size = tokenizer.get_vocab_size()
    for _ in range(400):
        check(decoder, [rng.randrange(size) for _ in range(rng.randrange(60))], skip)
    few = rng.sample(range(size), 4)
    for _ in range(200):  # long runs of the same troublemakers
        check(decoder, [rng.choice(few) for _ in range(80)], skip)
        few[rng.randrange(4)] = rng.randrange(size)


def test_a_token_that_always_has_the_same_text_is_decoded_once(monkeypatch):
    decoder = TokenDecoder(TOKENIZERS["byte-level"]())
    ids = [i for i in range(100, 200) if "\ufffd" not in decoder.decode([i], True)]
    expected = text_of(decoder, ids * 3, True)
    pieces_of(decoder, ids, True)
    decoded = []
    monkeypatch.setattr(
        decoder, "decode", lambda ids, skip, decode=decoder.decode: decoded.append(ids) or decode(ids, skip)
    )
    assert "".join(pieces_of(decoder, ids * 3, True)) == expected
    assert len(decoded) <= 3  # the first one, which has no context, and the end


@pytest.mark.parametrize("skip", [True, False])
def test_prompt_and_pieces_add_up_to_the_text_of_both(tokenizer, skip):
    """Wherever a text is cut into prompt and answer. Prompts end in a whole character, as those of `encode` do."""
    decoder, rng = TokenDecoder(tokenizer), random.Random(1)
    size = tokenizer.get_vocab_size()
    whole_characters = [
        i for i in range(size) if decoder.byte_of(i) is None and "\ufffd" not in decoder.decode([i], False)
    ]
    for _ in range(300):
        prompt = [rng.choice(whole_characters) for _ in range(rng.randrange(1, 30))]
        answer = [rng.randrange(size) for _ in range(rng.randrange(1, 10))]
        text = "".join(pieces_of(decoder, answer, skip, prompt))
        assert text_of(decoder, prompt, skip) + text == text_of(decoder, prompt + answer, skip), (prompt, answer)


@pytest.mark.parametrize("skip", [True, False])
def test_bytes_of_the_tokens_are_the_texts(tokenizer, skip):
    """Whatever the tokens are, but for U+FFFD in place of the bytes that are no character."""
    decoder, rng = TokenDecoder(tokenizer), random.Random(2)
    size = tokenizer.get_vocab_size()
    start = tokenizer.encode("a").ids  # a text that ends with a whole character
    for _ in range(400):
        ids = [rng.randrange(size) for _ in range(rng.randrange(1, 40))]
        shown = [token_id for token_id in ids if not (skip and decoder.is_special(token_id))]
        found = b"".join(map(decoder.bytes_of, shown))
        replace = "replace" if decoder.byte_of(2) is None else "replace_one_byte"
        assert found.decode("utf-8", replace) == "".join(pieces_of(decoder, ids, skip, start)), ids


def test_bytes_of_encoded_text_are_its_utf8(tokenizer):
    decoder = TokenDecoder(tokenizer)
    for text in TEXTS if decoder.byte_of(2) is None else ["🙂a▁日本"]:
        assert b"".join(map(decoder.bytes_of, tokenizer.encode(text).ids)).decode() == text.replace("▁", " ")


def test_bytes_of_tokens_of_every_kind(tokenizer):
    decoder = TokenDecoder(tokenizer)
    special = "<|im_start|>" if decoder.byte_of(2) is None else "<s>"
    assert decoder.bytes_of(tokenizer.token_to_id(special)) == special.encode()
    assert decoder.bytes_of(tokenizer.get_vocab_size() + 5) == b"", "of a vocabulary that is padded"
    if decoder.byte_of(2) is not None:
        assert decoder.bytes_of(2 + 0xE2) == b"\xe2"
        assert decoder.bytes_of(tokenizer.token_to_id("▁Hello")) == b" Hello"
        assert decoder.bytes_of(tokenizer.token_to_id("▁")) == b" "


def test_bytes_of_a_byte_level_vocabulary_within_a_sequence_of_decoders():
    tokenizer = byte_level()
    expected = [TokenDecoder(tokenizer).bytes_of(i) for i in range(tokenizer.get_vocab_size())]
    assert {bytes([b]) for b in range(0xF5)} - {b"\xc0", b"\xc1"} <= set(expected)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
    assert [TokenDecoder(tokenizer).bytes_of(i) for i in range(tokenizer.get_vocab_size())] == expected


def test_bytes_of_a_tokenizer_that_only_decodes():
    class Letters:
        def decode(self, token_ids, skip_special_tokens=True):
            return "".join(chr(0x3B1 + t) for t in token_ids)

    assert TokenDecoder(Letters()).bytes_of(1) == "β".encode()


def test_the_first_token_keeps_its_space():
    for name in ("llama", "metaspace"):
        tokenizer = TOKENIZERS[name]()
        hello, world, start = (tokenizer.token_to_id(piece) for piece in ("▁Hello", "▁world", "<s>"))
        decoder = TokenDecoder(tokenizer)
        assert "".join(pieces_of(decoder, [world], True, [start, hello])) == " world"
        assert "".join(pieces_of(decoder, [world], True, [hello, start])) == " world", "a chat prompt ends in a special"
        assert "".join(pieces_of(decoder, [hello, world], True, [start])) == "Hello world", "the first of the text"


def test_an_answer_may_complete_the_prompts_last_character():
    """Prompts of token ids may end within a character. What the prompt's own text has as U+FFFD is not repeated."""
    tokenizer, sun = TOKENIZERS["llama"](), [byte + 2 for byte in "日".encode()]
    a = tokenizer.token_to_id("a")
    assert pieces_of(TokenDecoder(tokenizer), [sun[2], a], True, [a, *sun[:2]]) == ["日", "a", ""]
    assert pieces_of(TokenDecoder(tokenizer), [a, a], True, [a, *sun[:2]]) == ["a", "a", ""]
    sun = _BYTE_LEVEL.encode("語").ids
    if len(sun) > 1:
        assert "".join(pieces_of(TokenDecoder(_BYTE_LEVEL), sun[1:], True, sun[:1])) == "語"
    literal = _BYTE_LEVEL.encode("\ufffd").ids
    letter = _BYTE_LEVEL.encode("a").ids
    assert "".join(pieces_of(TokenDecoder(_BYTE_LEVEL), letter, True, literal)) == "a"


def test_byte_tokens_come_out_as_soon_as_they_make_a_character():
    tokenizer = TOKENIZERS["llama"]()
    decoder = TokenDecoder(tokenizer)
    ids = [byte + 2 for byte in "\n\n🙂日".encode()]
    pieces = pieces_of(decoder, ids, True, [tokenizer.token_to_id("a")])
    assert pieces == ["\n", "\n", "", "", "", "🙂", "", "", "日", ""]
    broken = [byte + 2 for byte in b"\n\xff\xe6\x97A"]
    assert pieces_of(decoder, broken, True) == ["\n", "\ufffd", "", "", "\ufffd\ufffdA", ""]


def test_a_byte_level_token_that_looks_like_a_byte_is_text():
    tokenizer = byte_level()
    tokenizer.add_tokens(["<0x0A>"])
    ids = tokenizer.encode("a<0x0A>b").ids
    assert "".join(pieces_of(TokenDecoder(tokenizer), ids, True)) == "a<0x0A>b"


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
@settings(max_examples=100, deadline=None)
def test_pieces_of_any_text_add_up_and_are_whole_characters(text):
    decoder = TokenDecoder(_BYTE_LEVEL)
    ids = _BYTE_LEVEL.encode(text).ids
    pieces = pieces_of(decoder, ids, False)
    assert "".join(pieces) == text
    assert "".join(pieces).count("\ufffd") == text.count("\ufffd"), "no half character was ever shown"


_BYTE_LEVEL = byte_level()


@pytest.mark.parametrize("text", TEXTS)
def test_a_piece_comes_with_the_token_that_completes_it(text):
    """Nothing is held back longer than an unfinished character."""
    decoder, ids = TokenDecoder(_BYTE_LEVEL), _BYTE_LEVEL.encode(text).ids
    detokenizer, shown = Detokenizer(decoder, skip_special_tokens=False), ""
    for count, token_id in enumerate(ids, 1):
        shown += detokenizer.feed(token_id)
        whole = decoder.decode(ids[:count], False)
        assert shown == (whole[:-1] if whole.endswith("\ufffd") else whole)


def test_special_tokens_are_skipped_or_shown():
    tokenizer = _BYTE_LEVEL
    ids = tokenizer.encode("a<|im_end|>b").ids
    assert "".join(pieces_of(TokenDecoder(tokenizer), ids, True)) == "ab"
    assert "".join(pieces_of(TokenDecoder(tokenizer), ids, False)) == "a<|im_end|>b"


def test_leading_spaces_of_words_survive():
    tokenizer = TOKENIZERS["llama"]()
    ids = [tokenizer.token_to_id(piece) for piece in ("▁Hello", "<s>", "▁world", "▁", "▁", "a")]
    assert "".join(pieces_of(TokenDecoder(tokenizer), ids, True)) == "Hello world  a"


def test_the_window_stays_short_whatever_comes():
    """Long runs of broken bytes and of real U+FFFD do not make decoding quadratic."""
    rng = random.Random(1)
    continuation = [i for i in range(_BYTE_LEVEL.get_vocab_size()) if "\ufffd" in _BYTE_LEVEL.decode([i])]
    runs = [[rng.choice(continuation) for _ in range(300)], _BYTE_LEVEL.encode("\ufffd" * 300).ids, [0] * 300]
    for ids in runs:
        for skip in (True, False):
            detokenizer, pieces, longest = Detokenizer(TokenDecoder(_BYTE_LEVEL), skip_special_tokens=skip), [], 0
            for token_id in ids:
                pieces.append(detokenizer.feed(token_id))
                longest = max(longest, len(detokenizer._window))
            pieces.append(detokenizer.finish())
            assert "".join(pieces) == _BYTE_LEVEL.decode(ids, skip_special_tokens=skip)
            assert longest < 40


def test_smollm2(smollm2_dir):
    """The real tokenizer, through transformers: its own text, without clean-up."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    decoder, rng = TokenDecoder(tokenizer), random.Random(0)

    def own(ids, skip):
        return tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)

    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for skip in (True, False):
            assert "".join(pieces_of(decoder, ids, skip)) == own(ids, skip)
    for _ in range(300):
        ids = [rng.randrange(len(tokenizer)) for _ in range(rng.randrange(80))]
        for skip in (True, False):
            assert "".join(pieces_of(decoder, ids, skip)) == own(ids, skip)
    assert decoder.is_special(tokenizer.convert_tokens_to_ids("<|im_end|>"))


def cut(text, rng):
    """Random consecutive pieces of a text, some empty."""
    while text:
        count = rng.randrange(4)
        yield text[:count]
        text = text[count:]


def stream(stops, pieces):
    """(shown text, stop string), checking after every piece that nothing of a stop string that came true was shown."""
    matcher, shown = StopStrings(stops), ""
    for piece in pieces:
        text, stop = matcher.feed(piece)
        shown += text
        if stop is not None:
            return shown, stop
    return shown + matcher.finish(), None


def first_stop(stops, text):
    """By definition: the stop string that is complete first, the longer one of two."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end - len(stop)], stop
    return text, None


@given(
    text=st.text("ab\n", max_size=40),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=6), max_size=4),
    seed=st.integers(0, 1000),
)
@settings(max_examples=400, deadline=None)
def test_stop_strings_do_not_depend_on_the_pieces(text, stops, seed):
    assert stream(stops, cut(text, random.Random(seed))) == first_stop(stops, text)


@given(text=st.text("ab", max_size=30), stops=st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3))
@settings(max_examples=200, deadline=None)
def test_only_what_may_become_a_stop_string_is_held_back(text, stops):
    matcher = StopStrings(stops)
    shown, stop = matcher.feed(text)
    if stop is None:
        held = text[len(shown) :]
        assert held == "" or any(s.startswith(held) and s != held for s in stops)


def test_empty_stop_strings_are_no_stop_strings():
    assert stream(["", "x"], ["ab", "xc"]) == ("ab", "x")
    assert stream([""], ["ab"]) == ("ab", None)


def test_what_is_completed_too_early_is_text():
    matcher = StopStrings(["END"])
    assert matcher.feed("an END", may_stop=False) == ("an END", None)
    assert matcher.feed(" E", may_stop=False) == (" ", None)
    assert matcher.feed("ND.") == ("", "END"), "a stop string may begin before and be completed after"
