"""What a conversation format provides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from cai_runtime.formats.conversation import Conversation, Prepared


@dataclass(frozen=True)
class Capabilities:
    """What a model's format and template offer.

    tools: "native", the template describes them; "generic", this library does, in the system message; None, no calls.
    parallel: several calls in one answer. reasoning: answers may hold thoughts. switch: the template's variable that
    turns them on and off. efforts: the levels of `reasoning_effort`. media: what else than text a user's message may hold.
    """

    tools: Literal["native", "generic"] | None = None
    parallel: bool = True
    reasoning: bool = False
    switch: str | None = None
    efforts: tuple[str, ...] = ()
    media: frozenset[Literal["image", "audio"]] = frozenset()


class Format(Protocol):
    """How a family of models reads conversations and writes its answers. One object for each open model; it serves every
    request, from any thread that holds the tokenizer's lock.

    name: as in `Client(format=...)` and in `client.models.retrieve(...)`.
    """

    @property
    def name(self) -> str: ...

    @property
    def capabilities(self) -> Capabilities: ...

    def prepare(self, conversation: Conversation) -> Prepared:
        """Render the conversation, and settle what turns the answer's tokens into events.

        Raises:
            ConversationError: the template refuses it, or the model lacks what it asks for (`.capability`).
        """
        ...
