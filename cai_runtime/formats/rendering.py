"""From a conversation to the tokens of a prompt, with the checkpoint's own chat template."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cai_runtime.formats.conversation import Conversation
from cai_runtime.formats.template import render


@dataclass(frozen=True)
class Rendered:
    """A prompt. opening: its last characters, from the end of the last message on, as the template wrote them: where an
    answer begins, and whether that is inside a thought."""

    prompt_ids: list[int]
    opening: str = ""


def render_conversation(tokenizer: Any, conversation: Conversation) -> Rendered:
    """Raises ConversationError: see `template.render`."""
    return Rendered(render(tokenizer, conversation.messages, conversation.template))
