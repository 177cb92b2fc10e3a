"""Renders a conversation to token ids with the checkpoint's own chat template.

The template runs in transformers' sandboxed Jinja environment: it comes with the checkpoint, and that from anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cai_runtime.errors import ConversationError
from cai_runtime.formats.messages import Message


def has_template(tokenizer: Any) -> bool:
    """Whether the checkpoint came with a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def render(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Token ids of the conversation, ending where the assistant's answer begins.

    Args:
        tokenizer: transformers' tokenizer of the checkpoint.
        messages: the conversation, oldest first.

    Raises:
        ConversationError: there is no template, or the template refuses this conversation (its own words are quoted).
    """
    from jinja2.exceptions import TemplateError

    if not has_template(tokenizer):
        raise ConversationError(
            "This checkpoint has no chat template, so it can't chat: use completions, or put a chat_template.jinja "
            "beside its tokenizer.",
            param="model",
            capability="chat",
        )
    turns = [message.for_template() for message in messages]
    try:
        encoded = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=True)
    except TemplateError as error:  # `raise_exception` in a template, and every Jinja error
        raise ConversationError(f"The model's chat template refuses these messages: {error}") from error
    return _token_ids(encoded)


def _token_ids(encoded: Any) -> list[int]:
    # A mapping with input_ids; older versions give the ids bare. Some tokenizers add a batch dimension of one.
    ids = encoded["input_ids"] if isinstance(encoded, Mapping) else encoded
    if ids and isinstance(ids[0], (list, tuple)):
        ids = ids[0]
    return [int(token) for token in ids]
