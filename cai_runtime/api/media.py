"""Images and audio of a conversation on their way to a model: refused by the capability's name, or fetched."""

from __future__ import annotations

from dataclasses import replace

from cai_runtime.api.errors import BadRequestError, as_api_errors
from cai_runtime.api.open_model import OpenModel
from cai_runtime.formats.conversation import Conversation
from cai_runtime.formats.media import Media, RemoteMedia, lacking


def with_media(conversation: Conversation, opened: OpenModel) -> Conversation:
    """The conversation with its images and audio as bytes. They are fetched only for a model that takes them.

    Raises:
        BadRequestError: the model lacks a capability, there is no fetcher, or it fails.
    """
    parts = [part for message in conversation.messages for part in message.media]
    if not parts:
        return conversation
    for part in parts:
        if isinstance(part, RemoteMedia) and opened.fetcher is None:
            raise BadRequestError(
                f"'{part.place}': http(s) addresses are not fetched: send a data URI or a file: path, or give "
                "Client(fetcher=...), which reads them.",
                param=part.place,
                code="invalid_value",
            )
    with as_api_errors():
        with opened.tokenizer_lock:
            takes = opened.format.capabilities.media
        for part in parts:
            if part.kind not in takes:
                raise lacking(part)
        fetcher = opened.fetcher
        found: dict[RemoteMedia, Media] = {}  # one address is fetched once
        for part in parts:
            if isinstance(part, RemoteMedia) and part not in found:
                assert fetcher is not None
                found[part] = part.fetched(fetcher)
    messages = tuple(
        replace(
            message, content=tuple(found[part] if isinstance(part, RemoteMedia) else part for part in message.content)
        )
        if isinstance(message.content, tuple)
        else message
        for message in conversation.messages
    )
    return replace(conversation, messages=messages)
