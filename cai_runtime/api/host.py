"""Names to open models: where a `model` parameter leads, and the engines that serve it.

A model opens on its first use and stays until `unload` or `close`. Threads that ask for the same model wait for one
load; other models are not held up by it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cai_runtime.api.errors import BadRequestError, InternalServerError, NotFoundError, as_api_errors
from cai_runtime.convert.named import NAMED
from cai_runtime.convert.sources import pulled
from cai_runtime.home import cai_home
from cai_runtime.models.catalog import catalog

EngineFactory = Callable[..., Any]  # open_engine's signature: (path, **options) -> Engine


@dataclass(frozen=True)
class ResolvedModel:
    """Where a name leads. `path` is the absolute checkpoint directory."""

    name: str
    path: Path


@dataclass
class OpenModel:
    """An engine and what the API needs beside it. One for each directory, under whatever names it is asked for."""

    engine: Any
    tokenizer_lock: threading.Lock = field(default_factory=threading.Lock)  # a tokenizer is not for several threads

    @property
    def tokenizer(self) -> Any:
        return self.engine.tokenizer


@dataclass
class _Slot:
    lock: threading.Lock = field(default_factory=threading.Lock)  # held while the model loads or closes
    opened: OpenModel | None = None
    loading: Future[OpenModel] | None = None  # for those who wait without a thread of their own


class ModelHost:
    """Resolves names and keeps the engines of one client. Thread-safe.

    Args:
        default: the model of requests that name none.
        models: name to checkpoint directory.
        open_engine: opens one; called with the directory and `options`.
        options: device, dtype, KV cache budget and so on, for every model.
    """

    def __init__(
        self,
        *,
        default: str | None,
        models: Mapping[str, str | Path],
        open_engine: EngineFactory,
        options: Mapping[str, Any],
    ):
        self.default = default
        self.registered = {name: Path(path).expanduser().absolute() for name, path in models.items()}
        self._open_engine = open_engine
        self._options = dict(options)
        self._lock = threading.Lock()  # guards _slots and _closed; never held while a model loads
        self._slots: dict[Path, _Slot] = {}
        self._closed = False

    @property
    def keep(self) -> float | None:
        """At which elastic checkpoints open; None: at their largest."""
        return self._options.get("keep")

    def resolve(self, name: str | None) -> ResolvedModel:
        """The checkpoint directory that `name` (None: the default) stands for: a registered name, a catalogue id whose
        weights are in `cai_home()/models/<id>`, or a directory.

        Raises:
            BadRequestError: no name and no default.
            NotFoundError: nothing has this name, or its weights are not on this machine; the message says what to do.
        """
        name = self.default if name is None else name
        if not name:
            raise BadRequestError(
                "Missing required parameter: 'model'. Name one, or set a default with Client(model=...).",
                param="model",
                code="missing_required_parameter",
            )
        if path := self.registered.get(name):
            if not path.is_dir():
                raise _not_found(f"The model '{name}' is registered as {path}, which is not a directory.")
            return ResolvedModel(name, path)
        if name in catalog():
            path = cai_home() / "models" / name
            if (path / "config.json").is_file():
                return ResolvedModel(name, path)
            raise _not_found(
                f"The weights of '{name}' are not on this machine. Put a checkpoint of it into {path}, or register one "
                f"with Client(models={{{name!r}: directory}})."
            )
        directory = Path(name).expanduser()
        if directory.is_dir():
            return ResolvedModel(name, directory.absolute())
        if name in NAMED:
            if path := pulled(name):
                return ResolvedModel(name, path)
            # A client never downloads by itself.
            raise _not_found(f"'{name}' is not on this machine: fetch it with `cai pull {name}`.")
        base = name.removesuffix("-r")
        if base != name and (base in self.registered or base in catalog()):
            raise BadRequestError(
                f"'{name}' asks for reasoning by default, which is not supported yet: use '{base}'.",
                param="model",
                code="unsupported_parameter",
            )
        raise _not_found(
            f"The model '{name}' does not exist: it is no name given with Client(models=...), no directory and no "
            "catalogue id. client.models.list() shows what there is."
        )

    def open(self, model: ResolvedModel) -> OpenModel:
        """The open model; loads it on first use.

        Raises:
            APIError: the checkpoint can't be used or does not fit, or the client is closed.
        """
        with self._lock:
            self._check_open()
            slot = self._slots.setdefault(model.path, _Slot())
        with slot.lock:
            with self._lock:
                self._check_open()  # it may have been closed while this thread waited
            if slot.opened is None:
                with as_api_errors():
                    slot.opened = OpenModel(self._open_engine(model.path, **self._options))
            return slot.opened

    async def aopen(self, model: ResolvedModel) -> OpenModel:
        """`open` without blocking the event loop. However many tasks wait for a model, one thread loads it."""
        with self._lock:
            self._check_open()
            slot = self._slots.setdefault(model.path, _Slot())
            if opened := slot.opened:
                return opened
            if slot.loading is None or slot.loading.done():
                slot.loading = Future()
                slot.loading.set_running_or_notify_cancel()  # one waiter's cancellation must not reach the others
                threading.Thread(target=self._load, args=(model, slot.loading), name=f"cai-open-{model.name}").start()
            loading = slot.loading
        return await asyncio.wrap_future(loading)

    def _load(self, model: ResolvedModel, loading: Future[OpenModel]) -> None:
        try:
            loading.set_result(self.open(model))
        except BaseException as error:  # noqa: BLE001 - raised in whoever awaits it
            loading.set_exception(error)

    def unload(self, name: str) -> bool:
        """Close a model and give back its memory; running requests fail. False if it was not open. It opens again when
        it is next used.

        Raises:
            NotFoundError: as `resolve`.
        """
        model = self.resolve(name)
        with self._lock:
            slot = self._slots.get(model.path)
        return slot is not None and _close(slot)

    def close(self) -> None:
        """Close every model. Idempotent; waits for one that is loading. Later requests fail."""
        with self._lock:
            self._closed = True
            slots = [*self._slots.values()]
        for slot in slots:
            _close(slot)

    def _check_open(self) -> None:
        if self._closed:
            raise InternalServerError("This client is closed.", code="client_closed")


def _close(slot: _Slot) -> bool:
    with slot.lock:
        opened, slot.opened = slot.opened, None
        if opened is None:
            return False
        opened.engine.close()
        return True


def _not_found(message: str) -> NotFoundError:
    return NotFoundError(message, param="model", code="model_not_found")
