"""What a conversation format provides."""

from __future__ import annotations

from typing import Protocol

from cai_runtime.formats.conversation import Conversation, Prepared


class Format(Protocol):
    """How a family of models reads conversations and writes its answers. One object for each open model; it serves every
    request, from any thread that holds the tokenizer's lock.

    name: as in `Client(format=...)` and in `client.models.retrieve(...)`.
    """

    name: str

    def prepare(self, conversation: Conversation) -> Prepared:
        """Render the conversation, and settle what turns the answer's tokens into events.

        Raises:
            ConversationError: the template refuses it, or the model lacks what it asks for (`.capability`).
        """
        ...
