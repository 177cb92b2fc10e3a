"""A thought is closed when its tokens are used up, beside a grammar and with drafts taken back."""

from dataclasses import replace

import numpy as np
import pytest

from cai_runtime.errors import ConversationError
from cai_runtime.formats.budget import ThoughtBudget, budgeted
from cai_runtime.formats.conversation import Conversation, Reasoning, Tool
from cai_runtime.formats.hermes import HermesFormat
from cai_runtime.formats.messages import Message
from cai_runtime.grammars import Grammars

BEGIN, END, WORD = 40, 41, 7


def allowed(mask):
    row = np.full(2, 0xFFFFFFFF, np.uint32)
    mask.fill(row)
    return {token for token in range(64) if int(row[token >> 5]) >> (token & 31) & 1}


def test_a_thought_that_the_prompt_has_opened():
    mask = ThoughtBudget(2, (BEGIN,), END, open=True).mask()(())
    for _ in range(2):
        assert len(allowed(mask)) == 64
        mask.accept(WORD)
    assert allowed(mask) == {END}
    mask.accept(END)
    assert len(allowed(mask)) == 64


def test_several_thoughts_have_one_budget():
    mask = ThoughtBudget(2, (WORD, BEGIN), END).mask()(())
    for token in (BEGIN, WORD, WORD, WORD, BEGIN):  # the last two open one
        assert len(allowed(mask)) == 64
        mask.accept(token)
    mask.accept(WORD)
    mask.accept(END)
    for token in (WORD, BEGIN, WORD):
        mask.accept(token)
    assert allowed(mask) == {END}
    mask.rollback(1)
    assert len(allowed(mask)) == 64
    mask.rollback(4)
    mask.accept(WORD)
    assert len(allowed(mask)) == 64
    mask.accept(WORD)
    assert allowed(mask) == {END}


def test_a_call_ends_the_thought_too():
    """Else its arguments would be cut by the end of a thought."""
    call = 42
    mask = ThoughtBudget(3, (BEGIN,), END, frozenset({call}), open=True).mask()(())
    for token in (WORD, WORD, call, WORD, WORD, WORD):
        mask.accept(token)
        assert len(allowed(mask)) == 64
    mask.rollback(4)
    mask.accept(WORD)
    assert allowed(mask) == {END}


class Odd:
    """Allows odd tokens."""

    name = "grammar"

    def __init__(self, ends):
        self.accepted = list(ends)

    def fill(self, row):
        np.bitwise_and(row, np.uint32(0xAAAAAAAA), out=row)
        return True

    def accept(self, token_id):
        self.accepted.append(token_id)

    def rollback(self, count):
        del self.accepted[-count:]


def test_beside_a_grammar():
    mask = ThoughtBudget(1, (BEGIN,), END, open=True).mask(Odd)((63,))
    assert mask.name == "grammar" and allowed(mask) == set(range(1, 64, 2))
    mask.accept(WORD)
    assert allowed(mask) == {END}
    mask.accept(END)
    assert allowed(mask) == set(range(1, 64, 2)) and mask._inner.accepted == [63, WORD, END]
    mask.rollback(2)
    assert mask._inner.accepted == [63]
    assert budgeted(None, Odd) is Odd and budgeted(None, None) is None


def test_a_character_is_finished_before_the_end(byte_tokenizer):
    """Under a grammar, whose thought is whole characters."""
    byte_tokenizer.add_tokens(["<think>", "</think>"])
    end = byte_tokenizer.convert_tokens_to_ids("</think>")
    grammars = Grammars(byte_tokenizer, len(byte_tokenizer), [byte_tokenizer.eos_token_id])
    inner = grammars.mask(f'start: (/(?s:.+)/)? <[{end}]> "yes"')
    mask = ThoughtBudget(2, (), end, open=True).mask(inner)(())

    def allowed():
        row = np.full(-(-len(byte_tokenizer) // 32), 0xFFFFFFFF, np.uint32)
        mask.fill(row)
        return np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist()

    for token in byte_tokenizer.encode("a€", add_special_tokens=False):
        assert token in allowed() and allowed() != [end]
        mask.accept(token)
    assert allowed() == [end]
    mask.accept(end)


def test_formats_give_it(byte_tokenizer):
    byte_tokenizer.add_tokens(["<think>", "</think>"])
    byte_tokenizer.chat_template = "{{ messages[0].content }}{{ '<think>\n' }}"
    asked = Conversation((Message("user", "hi"),), reasoning=Reasoning(max_tokens=5))
    begin, end = byte_tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    assert HermesFormat(byte_tokenizer).prepare(asked).budget == ThoughtBudget(5, (begin,), end, open=True)
    assert HermesFormat(byte_tokenizer).prepare(Conversation(asked.messages)).budget is None
    call = byte_tokenizer.convert_tokens_to_ids("<tool_call>")
    with_tools = HermesFormat(byte_tokenizer).prepare(replace(asked, tools=(Tool("look"),)))
    assert with_tools.budget == ThoughtBudget(5, (begin,), end, frozenset({call}), open=True)


def test_a_thought_that_ends_with_text_has_none(byte_tokenizer):
    byte_tokenizer.chat_template = "{{ messages[0].content }}{{ '<think>\n' }}{# </think> #}"
    asked = Conversation((Message("user", "hi"),), reasoning=Reasoning(max_tokens=5))
    with pytest.raises(ConversationError, match="no token that ends") as caught:
        HermesFormat(byte_tokenizer).prepare(asked)
    assert caught.value.param == "reasoning_max_tokens"
