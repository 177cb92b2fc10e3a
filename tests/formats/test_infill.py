"""Text between two others: the prompt's layout in each family, and that what the texts spell stays text."""

import pytest

from cai_runtime.errors import ConversationError
from cai_runtime.formats.infill import Infill

QWEN = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
FAMILIES = {
    "qwen": (QWEN, "<|fim_pad|>"),
    "starcoder": (("<fim_prefix>", "<fim_suffix>", "<fim_middle>"), "<fim_pad>"),
    "codellama": (("▁<PRE>", "▁<SUF>", "▁<MID>"), "▁<EOT>"),
    "deepseek": (("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"), "<|endoftext|>"),
}


@pytest.fixture(params=FAMILIES)
def family(request, make_byte_tokenizer):
    """(tokenizer, ids of the three tokens, id of what ends the text)"""
    triple, end = FAMILIES[request.param]
    tokenizer = make_byte_tokenizer()
    tokenizer.add_tokens([*triple, end], special_tokens=request.param != "starcoder")
    return tokenizer, tokenizer.convert_tokens_to_ids(list(triple)), tokenizer.convert_tokens_to_ids(end)


def ids_of(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def test_the_prompts_layout(family):
    tokenizer, (before, after, between), end = family
    infill = Infill.find(tokenizer)
    expected = [before, *ids_of(tokenizer, "def f(x"), after, *ids_of(tokenizer, "): pass"), between]
    assert infill.encode("def f(x", "): pass") == expected
    assert infill.encode(ids_of(tokenizer, "def f(x"), "): pass") == expected
    assert infill.encode("", "a") == [before, after, *ids_of(tokenizer, "a"), between]
    assert set(infill.ends) == {before, after, between, end}


def test_what_the_texts_spell_stays_text(family):
    tokenizer, triple, end = family
    control = {tokenizer.convert_tokens_to_ids(text) for text in ("<s>", "</s>", "<|im_end|>")} | {*triple, end}
    spelled = "".join(map(tokenizer.decode, sorted(control)))
    found = Infill.find(tokenizer).encode(f"a{spelled}", f"{spelled}b")
    assert [token for token in found if token in control] == triple
    first, second = found.index(triple[1]), found.index(triple[2])
    assert (
        tokenizer.decode(found[1:first]) == f"a{spelled}"
        and tokenizer.decode(found[first + 1 : second]) == f"{spelled}b"
    )


def test_a_start_token_comes_first(family):
    from tokenizers.processors import TemplateProcessing

    tokenizer, triple, _ = family
    start = ("<s>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[start])
    infill = Infill.find(tokenizer)
    for prompt in ("a", ids_of(tokenizer, "a")):
        assert infill.encode(prompt, "b")[:2] == [tokenizer.bos_token_id, triple[0]]


def test_models_without_infill_tokens(make_byte_tokenizer):
    tokenizer = make_byte_tokenizer()
    assert Infill.find(tokenizer) is None
    tokenizer.add_tokens(list(QWEN[:2]), special_tokens=True)
    assert Infill.find(tokenizer) is None, "one is missing"


def test_a_tokenizer_that_cannot_take_it_as_text(family, monkeypatch):
    tokenizer, _, _ = family
    infill = Infill.find(tokenizer)
    monkeypatch.setattr(infill._encoder, "_copies", [None, None])
    with pytest.raises(ConversationError, match="control token") as caught:
        infill.encode("a", "<|im_end|>")
    assert caught.value.param == "suffix"
