"""Client and AsyncClient: the method tree of the `openai` package's clients, served in this process.

    with Client(model="path/to/checkpoint") as client:
        reply = client.chat.completions.create(messages=[{"role": "user", "content": "Why is the sky blue?"}])
        print(reply.choices[0].message.content)

No server, no network. Models open on first use and stay open until `client.models.unload(name)` or `client.close()`.
Any number of threads and tasks may use one client; their requests run in one batch per model.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, Self, overload

from openai.pagination import AsyncPage, SyncPage
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from typing_extensions import Unpack

from cai_runtime.api import chat as chat_endpoint
from cai_runtime.api import completions as completions_endpoint
from cai_runtime.api.chat import ChatParams
from cai_runtime.api.completions import CompletionChunk, CompletionParams
from cai_runtime.api.generation import AsyncStream, Stream
from cai_runtime.api.host import EngineFactory, ModelHost
from cai_runtime.api.models import list_models, require_text, retrieve_model
from cai_runtime.slim.elastic import checked_keep

__all__ = ["AsyncClient", "AsyncStream", "Client", "Stream"]

if TYPE_CHECKING:
    from cai_runtime.engine.engine import Engine


class _BaseClient:
    def __init__(
        self,
        model: str | Path | None = None,
        *,
        models: Mapping[str, str | Path] | None = None,
        device: str = "auto",
        dtype: str = "auto",
        keep: float | None = None,
        kv_cache: int | float | str | None = None,
        max_context: int | None = None,
        max_batch: int | None = None,
        prefill_chunk: int | None = None,
        prefix_cache: bool | None = None,
        max_waiting: int | None = None,
        int8_activations: bool | None = None,
        progress: bool | None = None,
        _engine_factory: EngineFactory | None = None,
    ):
        """Nothing is loaded yet.

        Args:
            model: the model of requests that name none: a name of `models`, a checkpoint directory or a catalogue id.
            models: name to checkpoint directory.
            device: "cpu", "cuda", "cuda:1", or "auto": a GPU if there is one.
            dtype: what float weights are held in: "fp32", "bf16", "fp16", or "auto", see `open_engine`.
            keep: of elastic checkpoints: the share of the dense parameters to open, at most, such as 0.6. Memory follows it.
                Default: the largest that the checkpoint holds.
            kv_cache: the key-value cache's budget for each model: bytes, a text such as "2GiB", or a fraction of the
                free memory as a float. Default: the engine chooses.
            max_context: positions a sequence may have. Default: what the model was made for.
            max_batch: sequences that run at once. Default: the engine's.
            prefill_chunk: prompt tokens fed in one step. Default: the engine's.
            prefix_cache: whether prompts reuse what equal beginnings left in the cache. Default: yes.
            max_waiting: requests that may wait for their turn; further ones raise RateLimitError. Default: no limit.
            int8_activations: round the inputs of int8 weights to int8 as well (W8A8): faster prefill for some accuracy.
                Default: no.
            progress: show a bar while weights load; None shows it on a terminal only.

        Raises:
            TypeError: `models` does not map names to directories, or `keep` is no number.
            KeepError: `keep` is not in (0, 1]. Whether a checkpoint opens at it is known when the model is opened: an
                UnprocessableEntityError then names its range.
        """
        if models is not None and not (isinstance(models, Mapping) and all(isinstance(n, str) and n for n in models)):
            raise TypeError(f"models must map names to checkpoint directories, got {models!r}")
        if keep is not None:
            keep = checked_keep(keep)
        options = {
            "keep": keep,
            "kv_cache": kv_cache,
            "max_context": max_context,
            "max_batch": max_batch,
            "prefill_chunk": prefill_chunk,
            "prefix_cache": prefix_cache,
            "max_waiting": max_waiting,
            "int8_activations": int8_activations,
            "progress": progress,
        }
        given = {name: value for name, value in options.items() if value is not None}
        self._host = ModelHost(
            default=None if model is None else str(model),
            models=models or {},
            open_engine=_engine_factory or _open_engine,
            options={"device": device, "dtype": dtype, **given},
        )
        self._shown = {"model": model, "models": models, "device": device, "dtype": dtype, **given}

    def __repr__(self) -> str:
        """How it was made, without what was left out."""
        given = (f"{name}={value!r}" for name, value in self._shown.items() if value is not None)
        return f"{type(self).__name__}({', '.join(given)})"


def _open_engine(path: Path, **options: Any) -> Any:
    from cai_runtime.engine.open import open_engine  # brings torch and transformers

    return open_engine(path, **options)


class Client(_BaseClient):
    """An in-process client: `chat.completions`, `completions` and `models`, as in the `openai` package. Thread-safe."""

    @cached_property
    def chat(self) -> Chat:
        return Chat(self._host)

    @cached_property
    def completions(self) -> Completions:
        return Completions(self._host)

    @cached_property
    def models(self) -> Models:
        return Models(self._host)

    def engine(self, model: str | None = None) -> Engine:
        """The engine that serves `model` (default: the client's), opened if it is not yet: for its `stats()`.

        Raises APIError as a request to that model would.
        """
        return self._host.open(self._host.resolve(model)).engine

    def close(self) -> None:
        """Close every model and give all memory back. Idempotent; running requests fail, and so do later ones."""
        self._host.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class AsyncClient(_BaseClient):
    """Client for asyncio: `create` and the methods of `models` are coroutines; a stream is an async iterator."""

    @cached_property
    def chat(self) -> AsyncChat:
        return AsyncChat(self._host)

    @cached_property
    def completions(self) -> AsyncCompletions:
        return AsyncCompletions(self._host)

    @cached_property
    def models(self) -> AsyncModels:
        return AsyncModels(self._host)

    async def close(self) -> None:
        """Close every model and give all memory back. Idempotent; running requests fail, and so do later ones."""
        await asyncio.to_thread(self._host.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()


class Chat:
    def __init__(self, host: ModelHost):
        self.completions = ChatCompletions(host)


class AsyncChat:
    def __init__(self, host: ModelHost):
        self.completions = AsyncChatCompletions(host)


class _Endpoint:
    def __init__(self, host: ModelHost):
        self._host = host


class ChatCompletions(_Endpoint):
    @overload
    def create(self, *, stream: Literal[True], **params: Unpack[ChatParams]) -> Stream[ChatCompletionChunk]: ...
    @overload
    def create(self, *, stream: Literal[False] | None = None, **params: Unpack[ChatParams]) -> ChatCompletion: ...
    @overload
    def create(
        self, *, stream: bool | None, **params: Unpack[ChatParams]
    ) -> ChatCompletion | Stream[ChatCompletionChunk]: ...
    def create(self, **params: Any) -> Any:
        """Answer a conversation. The parameters are those of ChatParams and `stream`.

        Returns:
            ChatCompletion; with `stream=True` a Stream of ChatCompletionChunk.

        Raises:
            APIError: see `cai_runtime.api.errors`; while streaming, the stream may raise it too.
        """
        return _create(chat_endpoint, self._host, params)


class AsyncChatCompletions(_Endpoint):
    @overload
    async def create(
        self, *, stream: Literal[True], **params: Unpack[ChatParams]
    ) -> AsyncStream[ChatCompletionChunk]: ...
    @overload
    async def create(self, *, stream: Literal[False] | None = None, **params: Unpack[ChatParams]) -> ChatCompletion: ...
    @overload
    async def create(
        self, *, stream: bool | None, **params: Unpack[ChatParams]
    ) -> ChatCompletion | AsyncStream[ChatCompletionChunk]: ...
    async def create(self, **params: Any) -> Any:
        """As `Client.chat.completions.create`, not blocking the event loop; with `stream=True` an AsyncStream."""
        return await _acreate(chat_endpoint, self._host, params)


class Completions(_Endpoint):
    @overload
    def create(self, *, stream: Literal[True], **params: Unpack[CompletionParams]) -> Stream[CompletionChunk]: ...
    @overload
    def create(self, *, stream: Literal[False] | None = None, **params: Unpack[CompletionParams]) -> Completion: ...
    @overload
    def create(
        self, *, stream: bool | None, **params: Unpack[CompletionParams]
    ) -> Completion | Stream[CompletionChunk]: ...
    def create(self, **params: Any) -> Any:
        """Continue a text. The parameters are those of CompletionParams and `stream`.

        Returns:
            Completion; with `stream=True` a Stream of its pieces.

        Raises:
            APIError: see `cai_runtime.api.errors`; while streaming, the stream may raise it too.
        """
        return _create(completions_endpoint, self._host, params)


class AsyncCompletions(_Endpoint):
    @overload
    async def create(
        self, *, stream: Literal[True], **params: Unpack[CompletionParams]
    ) -> AsyncStream[CompletionChunk]: ...
    @overload
    async def create(
        self, *, stream: Literal[False] | None = None, **params: Unpack[CompletionParams]
    ) -> Completion: ...
    @overload
    async def create(
        self, *, stream: bool | None, **params: Unpack[CompletionParams]
    ) -> Completion | AsyncStream[CompletionChunk]: ...
    async def create(self, **params: Any) -> Any:
        """As `Client.completions.create`, not blocking the event loop; with `stream=True` an AsyncStream."""
        return await _acreate(completions_endpoint, self._host, params)


class Models(_Endpoint):
    def list(self) -> SyncPage[Model]:
        """The catalogue and the client's own models: `.data`, or iterate."""
        return SyncPage[Model](data=list_models(self._host), object="list")

    def retrieve(self, model: str) -> Model:
        """One of them. Raises NotFoundError if there is none of this name."""
        return retrieve_model(self._host, model)

    def unload(self, model: str) -> bool:
        """Close a model and give back its memory; running requests fail, and the next use opens it again. False if it
        was not open. Raises NotFoundError if there is none of this name."""
        return self._host.unload(model)


class AsyncModels(_Endpoint):
    async def list(self) -> AsyncPage[Model]:
        """The catalogue and the client's own models: `.data`, or `async for`."""
        return AsyncPage[Model](data=await asyncio.to_thread(list_models, self._host), object="list")

    async def retrieve(self, model: str) -> Model:
        """One of them. Raises NotFoundError if there is none of this name."""
        return await asyncio.to_thread(retrieve_model, self._host, model)

    async def unload(self, model: str) -> bool:
        """As `Client.models.unload`."""
        return await asyncio.to_thread(self._host.unload, model)


def _create(endpoint: ModuleType, host: ModelHost, params: Mapping[str, Any]) -> Any:
    """The way of every request: check it, find and open its model, prepare its sequences, run them."""
    request = endpoint.parse(params)
    model = host.resolve(request.model)
    require_text(model)
    opened = host.open(model)
    running = endpoint.prepare(request, model.name, opened).submit(opened.engine)
    return Stream(running) if request.stream else running.whole()


async def _acreate(endpoint: ModuleType, host: ModelHost, params: Mapping[str, Any]) -> Any:
    request = endpoint.parse(params)
    model = host.resolve(request.model)
    require_text(model)
    opened = await host.aopen(model)
    generation = await asyncio.to_thread(endpoint.prepare, request, model.name, opened)
    running = generation.submit(opened.engine)  # not in a thread: a cancelled task would lose sight of what runs there
    return AsyncStream(running) if request.stream else await running.awhole()
