"""The functions of `cai_runtime` itself, over a client that all of them share.

import cai_runtime
print(cai_runtime.chat("Why is the sky blue?", model="path/to/checkpoint").choices[0].message.content)
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

from openai.pagination import SyncPage
from openai.types import Model

from cai_runtime.client import Client

_lock = threading.Lock()
_client: Client | None = None


def client() -> Client:
    """The shared client; made with default options on first use."""
    global _client
    with _lock:
        if _client is None:
            _client = Client()
        return _client


def configure(**options: Any) -> Client:
    """Replace the shared client by `Client(**options)` and close the one before. Returns the new one."""
    global _client
    new = Client(**options)
    with _lock:
        old, _client = _client, new
    if old is not None:
        old.close()
    return new


def close() -> None:
    """Close the shared client, if there is one, and give back its models' memory. The next call makes a new one."""
    global _client
    with _lock:
        old, _client = _client, None
    if old is not None:
        old.close()


def chat(messages: str | Iterable[Any], **params: Any) -> Any:
    """Answer a conversation, or one question given as a string: `Client.chat.completions.create` on the shared client.

    Args:
        messages: a question, or a list of messages.
        params: as for `create`, such as `model`, `stream`, `temperature`.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    return client().chat.completions.create(messages=messages, **params)


def complete(prompt: Any, **params: Any) -> Any:
    """Continue a text: `Client.completions.create` on the shared client.

    Args:
        prompt: a text, a list of texts, token ids, or a list of token ids.
        params: as for `create`, such as `model`, `stream`, `max_tokens`.
    """
    return client().completions.create(prompt=prompt, **params)


def respond(input: Any, **params: Any) -> Any:
    """Respond to a text or to a list of items: `Client.responses.create` on the shared client.

    Args:
        input: a question, or a list of items.
        params: as for `create`, such as `model`, `instructions`, `stream`, `previous_response_id`.
    """
    return client().responses.create(input=input, **params)


def batch(source: Any, output: Any = None, **options: Any) -> Any:
    """Answer many requests: `Client.batch` on the shared client.

    Args:
        source: a file in OpenAI's batch format, or an iterable of requests.
        output: a file for the results. Default: they are returned as an iterator.
        options: as for `Client.batch`: `ordered`, `window`, `progress`.
    """
    return client().batch(source, output, **options)


def embed(input: Any, **params: Any) -> Any:
    """The embeddings of texts: `Client.embeddings.create` on the shared client.

    Args:
        input: a text, a list of texts, token ids, or a list of token ids.
        params: as for `create`, such as `model`, `dimensions`, `encoding_format`.
    """
    return client().embeddings.create(input=input, **params)


def transcribe(file: Any, **params: Any) -> Any:
    """The text of speech: `Client.audio.transcriptions.create` on the shared client.

    Args:
        file: a path, bytes, an open file, (name, bytes), or (samples, rate).
        params: as for `create`, such as `model`, `language`, `stream`, `timestamp_granularities`.
    """
    return client().audio.transcriptions.create(file=file, **params)


def list_models() -> SyncPage[Model]:
    """The models there are: `Client.models.list` on the shared client."""
    return client().models.list()
