"""Client and AsyncClient: the method tree of the `openai` package's clients, served in this process.

    with Client(model="path/to/checkpoint") as client:
        reply = client.chat.completions.create(messages=[{"role": "user", "content": "Why is the sky blue?"}])
        print(reply.choices[0].message.content)

No server, no network. Models open on first use and stay open until `client.models.unload(name)` or `client.close()`.
Any number of threads and tasks may use one client; their requests run in one batch per model.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from openai import NOT_GIVEN, NotGiven, Omit, Timeout

from cai_runtime.api.generation import AsyncStream, Stream
from cai_runtime.api.host import EngineFactory, ModelHost
from cai_runtime.api.methods.audio import AsyncAudio, Audio
from cai_runtime.api.methods.batch import AsyncBatching, Batching
from cai_runtime.api.methods.chat import AsyncChat, Chat
from cai_runtime.api.methods.completions import AsyncCompletions, Completions
from cai_runtime.api.methods.embeddings import AsyncEmbeddings, Embeddings
from cai_runtime.api.methods.models import AsyncModels, Models
from cai_runtime.api.methods.responses import AsyncResponses, Responses
from cai_runtime.api.responses.store import ResponseStore
from cai_runtime.api.values import timeout_seconds
from cai_runtime.errors import OptionTypeError, OptionValueError
from cai_runtime.formats.find import FORMATS
from cai_runtime.formats.media import Fetcher
from cai_runtime.options import EngineOptions
from cai_runtime.scalars import shown

__all__ = ["AsyncClient", "AsyncStream", "Client", "Stream"]

GENERATION_CONFIG = ("model", "none")

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
        kv_dtype: str | None = None,
        max_context: int | None = None,
        max_batch: int | None = None,
        prefill_chunk: int | None = None,
        prefill_time: float | None = None,
        prefix_cache: bool | None = None,
        max_waiting: int | None = None,
        backend: str | None = None,
        activations: str | None = None,
        cuda_graphs: bool | None = None,
        progress: bool | None = None,
        generation_config: str = "model",
        format: str | None = None,
        fetcher: Fetcher | None = None,
        timeout: float | Timeout | None = None,
        _engine_factory: EngineFactory | None = None,
    ):
        """Nothing is loaded yet, but every option is checked.

        Args:
            model: the model of requests that name none: a name of `models`, a checkpoint directory or a catalogue id.
            models: name to checkpoint directory.
            device: "cpu", "cuda", "cuda:1", or "auto": a GPU if there is one.
            dtype: what float weights are held in: "fp32", "bf16", "fp16", or "auto", see `EngineOptions`.
            keep: of elastic checkpoints: the share of the dense parameters to open, at most, such as 0.6. Memory follows it.
                Default: the largest that the checkpoint holds.
            kv_cache: the key-value cache's budget for each model: bytes, a text such as "2GiB", or a fraction of the
                free memory as a float. Default: the engine chooses.
            kv_dtype: of the cached keys and values: as `dtype`, or "int8": a quarter of fp32's bytes, half of bf16's, for a
                loss that docs/results.md gives. Default: the activations'. An encoder's output is never held in int8.
            max_context: positions a sequence may have. Default: what the model was made for.
            max_batch: sequences that run at once. Default: the engine's.
            prefill_chunk: prompt tokens fed in one step, at most. Default: 512, on a GPU 4096.
            prefill_time: seconds that one long prompt may hold up the next token of the others. Default: the engine's.
            prefix_cache: whether prompts reuse what equal beginnings left in the cache. Default: yes.
            max_waiting: requests that may wait for their turn; further ones raise RateLimitError. Default: no limit.
            backend: kernels to use: "reference", "cpu", "triton" or "cuda". Default: the device's.
            activations: what the inputs of int8 weights are rounded to: "fp32" (not at all) or "int8". Default, "auto": int8
                on a CPU with VNNI, where it costs less than 0.3 % of perplexity, elsewhere in encoders (Whisper's) alone.
            cuda_graphs: record decode steps as CUDA graphs. Default: where there is a GPU.
            progress: show a bar while weights load; None shows it on a terminal only.
            generation_config: "model": a request that names no temperature, top_k, top_p, min_p or repetition_penalty
                gets that of the checkpoint's generation_config.json, see `GenerationDefaults`. "none": OpenAI's
                defaults, whatever the checkpoint says.
            format: how the models write thoughts and tool calls, such as "hermes" or "generic"; see
                `cai_runtime.formats.find`. Default: found by each checkpoint's chat template.
            fetcher: reads images and audio at http(s) addresses: called with the address, in a thread that may wait,
                returns bytes. Only for models that take them. Default: such addresses are refused.
            timeout: seconds that a request may take, see `create`. Default: no limit.

        Raises:
            TypeError: an option is of a wrong type, or `models` does not map names to directories.
            ValueError: an option has a value that it can't have; the message names what is allowed. Whether a checkpoint
                opens at `keep` is known when it is opened: an UnprocessableEntityError then names its range.
        """
        if model is not None and not isinstance(model, (str, os.PathLike)):
            raise OptionTypeError(f"model must be a name or a directory, got {shown(model)}")
        if models is not None and not (isinstance(models, Mapping) and all(isinstance(n, str) and n for n in models)):
            raise OptionTypeError(f"models must map names to checkpoint directories, got {shown(models)}")
        if not isinstance(generation_config, str) or generation_config not in GENERATION_CONFIG:
            raise OptionValueError(f'generation_config must be "model" or "none", got {shown(generation_config)}')
        if format is not None and not isinstance(format, str):
            raise OptionTypeError(f"format must be a conversation format's name, got {shown(format)}")
        if format is not None and format not in FORMATS:
            raise OptionValueError(f"format must be one of {', '.join(FORMATS)}, got {shown(format)}")
        if fetcher is not None and not callable(fetcher):
            raise OptionTypeError(f"fetcher must be callable with an address, got {shown(fetcher)}")
        options = EngineOptions.of(
            device=device,
            dtype=dtype,
            keep=keep,
            kv_cache=kv_cache,
            kv_dtype=kv_dtype,
            max_context=max_context,
            max_batch=max_batch,
            prefill_chunk=prefill_chunk,
            prefill_time=prefill_time,
            prefix_cache=prefix_cache,
            max_waiting=max_waiting,
            backend=backend,
            activations=activations,
            cuda_graphs=cuda_graphs,
            progress=progress,
        )
        self._timeout = _checked_timeout(timeout)
        self._responses = ResponseStore()
        self._host = ModelHost(
            default=None if model is None else str(model),
            models=models or {},
            open_engine=_engine_factory or _open_engine,
            options=options,
            own_defaults=generation_config == "model",
            format_name=format,
            fetcher=fetcher,
        )
        # What makes this client again, in another process too.
        self._made_from = {"model": model, "models": None if models is None else dict(models), **options.given()}
        if generation_config != "model":
            self._made_from["generation_config"] = generation_config
        if format is not None:
            self._made_from["format"] = format
        if fetcher is not None:
            self._made_from["fetcher"] = fetcher
        if _engine_factory is not None:
            self._made_from["_engine_factory"] = _engine_factory

    def with_options(self, *, timeout: float | Timeout | NotGiven | None = NOT_GIVEN, max_retries: Any = None) -> Self:
        """This client with another `timeout`. Both have the same open models: closing one closes the other.

        max_retries: accepted for programs that were written for the `openai` client; nothing here is retried.
        """
        other = object.__new__(type(self))
        other._host, other._made_from, other._responses = self._host, self._made_from, self._responses
        other._timeout = self._timeout if isinstance(timeout, (NotGiven, Omit)) else _checked_timeout(timeout)
        return other

    def __repr__(self) -> str:
        """How it was made, without what was left out."""
        shown_options = {**self._made_from, "timeout": self._timeout}
        given = (f"{k}={v!r}" for k, v in shown_options.items() if v is not None and not k.startswith("_"))
        return f"{type(self).__name__}({', '.join(given)})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Copying and pickling give a new client of the same options, which opens its models itself."""
        return _client_again, (type(self), {**self._made_from, "timeout": self._timeout})


def _client_again(kind: type[_BaseClient], options: dict[str, Any]) -> _BaseClient:
    return kind(**options)


def _checked_timeout(timeout: Any) -> float | None:
    try:
        return timeout_seconds(timeout)
    except TypeError as error:
        raise OptionTypeError(f"timeout {error}") from None
    except ValueError as error:
        raise OptionValueError(f"timeout {error}") from None


def _open_engine(path: Path, **options: Any) -> Any:
    from cai_runtime.engine.open import open_engine  # brings torch and transformers

    return open_engine(path, **options)


class Client(Batching, _BaseClient):
    """An in-process client: `chat.completions`, `completions`, `responses`, `embeddings`, `audio` and `models`, as in the
    `openai` package, and `batch`. Thread-safe."""

    @cached_property
    def chat(self) -> Chat:
        return Chat(self._host, self._timeout)

    @cached_property
    def completions(self) -> Completions:
        return Completions(self._host, self._timeout)

    @cached_property
    def responses(self) -> Responses:
        return Responses(self._host, self._timeout, self._responses)

    @cached_property
    def embeddings(self) -> Embeddings:
        return Embeddings(self._host, self._timeout)

    @cached_property
    def audio(self) -> Audio:
        return Audio(self._host, self._timeout)

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
        self._responses.clear()
        self._host.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class AsyncClient(AsyncBatching, _BaseClient):
    """Client for asyncio: `create` and the methods of `models` are coroutines; a stream is an async iterator."""

    @cached_property
    def chat(self) -> AsyncChat:
        return AsyncChat(self._host, self._timeout)

    @cached_property
    def completions(self) -> AsyncCompletions:
        return AsyncCompletions(self._host, self._timeout)

    @cached_property
    def responses(self) -> AsyncResponses:
        return AsyncResponses(self._host, self._timeout, self._responses)

    @cached_property
    def embeddings(self) -> AsyncEmbeddings:
        return AsyncEmbeddings(self._host, self._timeout)

    @cached_property
    def audio(self) -> AsyncAudio:
        return AsyncAudio(self._host, self._timeout)

    @cached_property
    def models(self) -> AsyncModels:
        return AsyncModels(self._host)

    async def engine(self, model: str | None = None) -> Engine:
        """As `Client.engine`."""
        return (await self._host.aopen(self._host.resolve(model))).engine

    async def close(self) -> None:
        """Close every model and give all memory back. Idempotent; running requests fail, and so do later ones."""
        self._responses.clear()
        await asyncio.to_thread(self._host.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()
