"""The conversation format of models whose whole output is the answer: no reasoning, no tool calls."""

from __future__ import annotations

from typing import Any

from cai_runtime.engine.output import TextOutput
from cai_runtime.formats.conversation import Conversation, Prepared
from cai_runtime.formats.rendering import render_conversation


class PlainFormat:
    """See `base.Format`. All text is visible content.

    tokenizer: transformers' tokenizer of the checkpoint.
    """

    name = "plain"

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer

    def prepare(self, conversation: Conversation) -> Prepared:
        rendered = render_conversation(self._tokenizer, conversation)
        answer = conversation.answer
        return Prepared(rendered.prompt_ids, TextOutput, None if answer is None else f"start: {answer.expression}")
