"""What a whole answer must be, in llguidance's dialect of Lark."""

from __future__ import annotations


def answer_grammar(format, turn):
    answer = turn.conversation.answer
    return None if answer is None else f"start: {answer.expression}"
