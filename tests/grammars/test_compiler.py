"""Grammars of a model: which tokens are allowed where, what is kept, and what is refused."""

import threading

import numpy as np
import pytest

from cai_runtime.errors import GrammarError
from cai_runtime.grammars import Grammars, compiler


def row_of(mask, vocab_size):
    row = np.full(-(-vocab_size // 32), 0xFFFFFFFF, np.uint32)
    mask.fill(row)
    return row


def allowed(mask, grammars):
    size = grammars.vocabulary.vocab_size
    return np.flatnonzero(np.unpackbits(row_of(mask, size).view(np.uint8), bitorder="little")).tolist()


@pytest.fixture(scope="module")
def ids(grammars):
    tokens = grammars.vocabulary.tokenizer
    return {tokens.decode_bytes([i]).decode("latin1"): i for i in range(256)}


@pytest.fixture(scope="module")
def made(make_tokenizer):
    """Grammars of a tokenizer with special tokens of several kinds, and the tokenizer."""
    tokenizer = make_tokenizer(additional_special_tokens=["<|call|>", "[TOOL]"])
    tokenizer.add_tokens(["<think>"])
    return Grammars(tokenizer, len(tokenizer) + 30, [tokenizer.eos_token_id]), tokenizer


@pytest.mark.parametrize("text", ["~/a/", "/(?s:.*)/", "/[^a]*/", "%json {}", r"/(?s-u:.)*/"])
def test_special_tokens_and_ids_beyond_the_tokenizer_are_no_text(made, text):
    grammars, tokenizer = made
    try:
        mask = grammars.mask(f"start: {text}")()
    except GrammarError:
        return  # refused is fine
    found = allowed(mask, grammars)
    assert found and max(found) <= tokenizer.eos_token_id
    assert not {tokenizer.bos_token_id, *tokenizer.convert_tokens_to_ids(["<|call|>", "[TOOL]", "<think>"])} & {*found}


def test_special_tokens_by_name_and_by_id(made):
    grammars, tokenizer = made
    call, tool, think = tokenizer.convert_tokens_to_ids(["<|call|>", "[TOOL]", "<think>"])
    assert allowed(grammars.mask("start: <|call|> | <think>")(), grammars) == sorted([call, think])
    assert allowed(grammars.mask(f"start: <[{tool}]>")(), grammars) == [tool]
    mask = grammars.mask('start: "<|call|>" <|call|>')()
    for char in "<|call|>":
        assert allowed(mask, grammars) == tokenizer.convert_tokens_to_ids([char]), "in quotes it is text"
        mask.accept(tokenizer.convert_tokens_to_ids(char))
    assert allowed(mask, grammars) == [call]
    with pytest.raises(GrammarError, match="unknown special token"):
        grammars.mask("start: <|nothing|>")


def test_the_text_may_end_exactly_where_the_grammar_may(grammars, tokenizer, ids):
    eos, other = tokenizer.eos_token_id, ids["\n"]
    made = grammars.mask('start: "a" "b"*')
    for ends, expected in ([(), [eos]], [(eos,), [eos]], [(eos, other), [other, eos]], [(other,), [other]]):
        mask = made(ends)
        assert allowed(mask, grammars) == [ids["a"]]
        mask.accept(ids["a"])
        assert allowed(mask, grammars) == sorted([ids["b"], *expected])
    mask = grammars.mask('start: "ab"')()
    mask.accept(ids["a"])
    mask.accept(ids["b"])
    assert allowed(mask, grammars) == [eos], "finished: the ends alone"


def test_an_end_that_the_grammar_names(made):
    grammars, tokenizer = made
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    assert allowed(grammars.mask("start: <eos>")(), grammars) == [eos]
    assert allowed(grammars.mask("start: <bos>")((eos,)), grammars) == [bos]


def test_rollback_leads_back(grammars, write):
    made = grammars.mask('start: %json {"type": "array", "minItems": 40, "items": {"enum": [1, "x", {"a": null}]}}')
    size, rng = grammars.vocabulary.vocab_size, np.random.default_rng(0)
    mask, rows, tokens = made(), [], []
    for _ in range(300):
        rows.append(row_of(mask, size))
        choices = np.flatnonzero(np.unpackbits(rows[-1].view(np.uint8), bitorder="little")[:257])
        if len(choices) == 0 or len(tokens) == 60:
            break
        tokens.append(int(rng.choice(choices)))
        mask.accept(tokens[-1])
    for back in (1, 2, 7, 30):
        mask.rollback(back)
        rows, tokens, gone = rows[:-back], tokens[:-back], tokens[-back:]
        assert (row_of(mask, size) == rows[-1]).all()
        again = made()
        for token in tokens:
            again.accept(token)
        assert (row_of(again, size) == rows[-1]).all()
        assert gone


def test_filling_together_is_filling_alone(grammars, ids):
    texts = ['start: "a"', "start: /[0-9]+/", "start: %json {}", 'start: "b" | "c"']
    masks = [grammars.mask(text)() for text in texts]
    size = grammars.vocabulary.vocab_size
    rows = np.full((6, -(-size // 32)), 0xFFFFFFFF, np.uint32)
    where = [1, 2, 4, 5]
    assert type(masks[0]).fill_all([*zip(masks, where, strict=True)], rows) == {}
    for mask, row in zip(masks, where, strict=True):
        assert (rows[row] == row_of(mask, size)).all()
    assert (rows[[0, 3]] == 0xFFFFFFFF).all()


def test_a_mask_that_went_astray_says_so(grammars, ids):
    mask, good = grammars.mask('start: "ab"', "regex")(), grammars.mask('start: "ab"')()
    with pytest.raises(GrammarError, match="'regex' can't be followed") as caught:
        mask.accept(ids["b"])
    assert caught.value.param == "regex"
    rows = np.full((2, 9), 0xFFFFFFFF, np.uint32)
    errors = type(mask).fill_all([(mask, 0), (good, 1)], rows)
    assert list(errors) == [0] and isinstance(errors[0], GrammarError)
    assert np.unpackbits(rows[1].view(np.uint8)).sum() == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("start: x", "unknown name"), ("begin: /a/", "start"), ("start: s\ns: s", "no text that fits it"),
        ('start: "' + "a" * compiler.MAX_CHARACTERS + '"', "too large"), ("start: /(?=a)/", "look-around"),
    ],
    ids=["unknown", "no start", "empty", "size", "lookahead"],
)  # fmt: skip
def test_what_can_not_be_compiled(grammars, text, message):
    with pytest.raises(GrammarError, match=message) as caught:
        grammars.mask(text, "response_format")
    assert caught.value.param == "response_format" and "'response_format'" in str(caught.value)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("limit", ["max_grammar_size", "initial_lexer_fuel"])
def test_what_takes_too_much(tokenizer, limit, monkeypatch):
    """The limits are counts, so that a refusal does not depend on the machine."""
    grammars = Grammars(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    text = 'start: %json {"type": "object", "properties": {"a": {"type": "string", "pattern": "^[a-z]{3}"}}}'
    assert grammars.mask(text)
    monkeypatch.setitem(compiler.LIMITS, limit, 1)
    with pytest.raises(GrammarError, match="'regex'") as caught:
        grammars.mask(text + " ", "regex")
    assert caught.value.param == "regex"
    assert grammars.mask(text), "what was compiled before is kept"


def test_the_newest_are_kept(grammars, monkeypatch):
    monkeypatch.setattr(compiler, "MAX_KEPT", 3)
    first = grammars.mask('start: "1"').matcher
    assert grammars.mask('start: "1"', "other").matcher is first
    for i in (2, 3):
        grammars.mask(f'start: "{i}"')
    assert grammars.mask('start: "1"').matcher is first, "used, and so the newest"
    grammars.mask('start: "4"')
    grammars.mask('start: "5"')
    grammars.mask('start: "6"')
    assert grammars.mask('start: "1"').matcher is not first
    assert len(grammars._kept) == 3
    assert grammars._characters == sum(map(len, grammars._kept))


def test_what_took_long_leaves_room_for_little_else(tokenizer, monkeypatch):
    """It takes as much more memory."""
    grammars = Grammars(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    for i in range(3):
        grammars.mask(f'start: "{i}"')
    assert len(grammars._kept) == 3 and grammars._seconds > 0
    monkeypatch.setattr(compiler, "MAX_KEPT_SECONDS", 0.0)
    newest = grammars.mask('start: "new"').matcher
    assert list(grammars._kept) == ['start: "new"'] and grammars.mask('start: "new"').matcher is newest
    assert grammars._seconds == pytest.approx(grammars._kept['start: "new"'].seconds)


def test_many_threads(tokenizer):
    grammars = Grammars(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    rows, errors = [], []

    def work(i):
        try:
            mask = grammars.mask('start: "a" | "b"')()
            rows.append(row_of(mask, len(tokenizer)).tolist())
        except Exception as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and len({tuple(row) for row in rows}) == 1


def test_a_tokenizer_of_sentencepiece():
    """Words with a mark for the space before them, and tokens for single bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "▁a", "▁é", '"', '"a']
    inner = Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(vocabulary)}, [("▁", "a")], byte_fallback=True, unk_token="<unk>"
        )
    )
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    grammars = Grammars(tokenizer, len(vocabulary) + 5, [2])

    def names(text, *accepted):
        mask = grammars.mask(f"start: {text}")()
        for token in accepted:
            mask.accept(vocabulary.index(token))
        return {vocabulary[i] for i in allowed(mask, grammars)}

    assert names('"a"') == {"a"}, "what must come is tokenized as the tokenizer does"
    assert names('"a" | "b"') == {"a", "b", "<0x61>", "<0x62>"}
    assert names('" é" | " a"') == {"▁", "<0x20>", "▁a", "▁é"}
    assert names('" é"', "▁") == {"<0xC3>"}
    assert names('" é"', "▁", "<0xC3>") == {"<0xA9>"}
    assert names('%json {"type": "string"}') == {'"', '"a', "<0x22>"}
    assert "</s>" in names("/a*/") and "<unk>" not in names("/(?s:.)*/")


def test_tokenizers_that_can_not_be_used(tokenizer):
    class Slow:
        """No `backend_tokenizer`."""

    for bad, eos, message in ((Slow(), [3], "fast tokenizer"), (tokenizer, [], "ends a text")):
        with pytest.raises(GrammarError, match=message):
            Grammars(bad, 300, eos).mask('start: "a"')
    words = tokenizer_of_words()
    with pytest.raises(GrammarError, match="can't be read"):
        Grammars(words, 3, [0]).mask('start: "a"')


def tokenizer_of_words():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<eos>": 0, "<unk>": 1, "w": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
