"""Names to open models: where a `model` parameter leads, and the engines that serve it.

A model opens on its first use and stays until `unload` or `close`. Threads that ask for the same model wait for one
load; other models are not held up by it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cai_runtime.api.errors import (
    APITimeoutError,
    BadRequestError,
    InternalServerError,
    NotFoundError,
    as_api_errors,
)
from cai_runtime.api.open_model import OpenModel
from cai_runtime.convert.named import NAMED
from cai_runtime.convert.sources import pulled
from cai_runtime.errors import OptionTypeError, OptionValueError
from cai_runtime.formats.media import Fetcher
from cai_runtime.home import cai_home, existing
from cai_runtime.models.catalog import catalog
from cai_runtime.options import EngineOptions
from cai_runtime.scalars import shown
from cai_runtime.slim.generation_defaults import GenerationDefaults

EngineFactory = Callable[..., Any]  # open_engine's signature: (path, **options) -> Engine


@dataclass(frozen=True)
class ResolvedModel:
    """Where a name leads. `path` is the checkpoint directory, absolute and without symbolic links.

    reasons: whether requests that say nothing of it ask for reasoning, as names ending in -r do.
    """

    name: str
    path: Path
    reasons: bool = False


@dataclass
class _Slot:
    lock: threading.Lock = field(default_factory=threading.Lock)  # held while the model loads or closes
    opened: OpenModel | None = None
    loading: Future[OpenModel] | None = None  # for those who wait without a thread of their own


class ModelHost:
    """Resolves names and keeps the engines of one client. Thread-safe.

    Args:
        default: the model of requests that name none.
        models: name to checkpoint directory. Relative ones, and a relative default, are of the directory that the
            process is in now.
        open_engine: opens one; called with the directory and the options as keywords.
        options: device, dtype, KV cache budget and so on, for every model.
        own_defaults: whether a request's missing sampling parameters are the checkpoint's own.
        format_name: of every model's conversations; None: found by each checkpoint's files.
        fetcher: of images and audio at http(s) addresses; None: they are refused.
    """

    def __init__(
        self,
        *,
        default: str | None,
        models: Mapping[str, str | Path],
        open_engine: EngineFactory,
        options: EngineOptions,
        own_defaults: bool = True,
        format_name: str | None = None,
        fetcher: Fetcher | None = None,
    ):
        self.default = default
        self.registered = {name: _registered(name, path) for name, path in models.items()}
        self._default_directory = None if default is None else existing(default)
        self._open_engine = open_engine
        self._options = options
        self._own_defaults = own_defaults
        self._format_name, self._fetcher = format_name, fetcher
        self._lock = threading.Lock()  # guards _slots and _closed; never held while a model loads
        self._slots: dict[Path, _Slot] = {}
        self._closed = False

    @property
    def keep(self) -> float | None:
        """At which elastic checkpoints open; None: at their largest."""
        return self._options.keep

    @property
    def max_batch(self) -> int:
        """Sequences that run at once in each engine."""
        return self._options.max_batch

    def resolve(self, name: str | None) -> ResolvedModel:
        """The checkpoint directory that `name` (None: the default) stands for: a registered name, a catalogue id whose
        weights are in `cai_home()/models/<id>`, or a directory. A name of none of these that ends in -r stands for the
        model without that suffix, with reasoning by default.

        Raises:
            BadRequestError: no name and no default.
            NotFoundError: nothing has this name, or its weights are not on this machine; the message says what to do.
        """
        name = self.default if name is None else model_name(name)
        if not name:
            raise BadRequestError(
                "Missing required parameter: 'model'. Name one, or set a default with Client(model=...).",
                param="model",
                code="missing_required_parameter",
            )
        if path := self.registered.get(name):
            directory = existing(path)
            if directory is None:
                raise _not_found(f"The model {shown(name)} is registered as {path}, which is not a directory.")
            return ResolvedModel(name, directory)
        if name in catalog():
            path = cai_home() / "models" / name
            if (path / "config.json").is_file():
                return ResolvedModel(name, path.resolve())
            raise _not_found(
                f"The weights of '{name}' are not on this machine. Put a checkpoint of it into {path}, or register one "
                f"with Client(models={{{name!r}: directory}})."
            )
        if directory := self.directory(name):
            return ResolvedModel(name, directory)
        if name in NAMED:
            # A client never downloads by itself.
            raise _not_found(f"'{name}' is not on this machine: fetch it with `cai pull {name}`.")
        if base := self.reasoning_base(name):
            return replace(self.resolve(base), name=name, reasons=True)
        raise _not_found(
            f"The model {shown(name)} does not exist: it is no name given with Client(models=...), no directory and no "
            "catalogue id. client.models.list() shows what there is."
        )

    def reasoning_base(self, name: str) -> str | None:
        """The model that a name ending in -r stands for, with reasoning by default; None if there is none."""
        base = name.removesuffix("-r")
        known = base in self.registered or base in catalog() or base in NAMED or self.directory(base) is not None
        return base if base != name and base and known else None

    def directory(self, name: str) -> Path | None:
        """The directory called `name`, however it is spelled, as one path, or else the one that `cai pull` fetched under
        this name; None if there is none."""
        if name == self.default and self._default_directory is not None:
            return self._default_directory
        if directory := existing(name):
            return directory
        path = pulled(name)
        return None if path is None else path.resolve()

    @staticmethod
    def pulled_models() -> dict[str, Path]:
        """Name to directory of what `cai pull` fetched by name, as `directory` has it."""
        return {name: existing(name) or path.resolve() for name in NAMED if (path := pulled(name)) is not None}

    def open(self, model: ResolvedModel, timeout: float | None = None) -> OpenModel:
        """The open model; loads it on first use, and again if its engine has ended by an error.

        timeout: seconds to wait for the load; it goes on in a thread of its own when they are over.

        Raises:
            APIError: the checkpoint can't be used or does not fit, or the client is closed; APITimeoutError.
        """
        if timeout is not None:
            found = self._begin(model)
            if isinstance(found, OpenModel):
                return found
            try:
                return found.result(timeout)
            except TimeoutError:
                raise APITimeoutError(
                    f"The model {shown(model.name)} was not open after {timeout:.3g} s; it goes on loading for later "
                    "requests.",
                    code="timeout",
                ) from None
        with self._lock:
            self._check_open()
            slot = self._slots.setdefault(model.path, _Slot())
        with slot.lock:
            with self._lock:
                self._check_open()  # it may have been closed while this thread waited
            if slot.opened is not None and slot.opened.ended:
                _close_dead(slot)
            if slot.opened is None:
                with as_api_errors():
                    defaults = GenerationDefaults.read(model.path) if self._own_defaults else GenerationDefaults()
                    engine = self._open_engine(model.path, **self._options.given())
                    slot.opened = OpenModel(
                        engine, defaults, path=model.path, format_name=self._format_name, fetcher=self._fetcher
                    )
            return slot.opened

    async def aopen(self, model: ResolvedModel) -> OpenModel:
        """`open` without blocking the event loop. However many tasks wait for a model, one thread loads it."""
        found = self._begin(model)
        return found if isinstance(found, OpenModel) else await asyncio.wrap_future(found)

    def _begin(self, model: ResolvedModel) -> OpenModel | Future[OpenModel]:
        """The open model, or the future of the thread that loads it, which is started if there is none."""
        with self._lock:
            self._check_open()
            slot = self._slots.setdefault(model.path, _Slot())
            if (opened := slot.opened) and not opened.ended:
                return opened
            if slot.loading is None or slot.loading.done():
                slot.loading = Future()
                slot.loading.set_running_or_notify_cancel()  # one waiter's cancellation must not reach the others
                threading.Thread(target=self._load, args=(model, slot.loading), name="cai-open").start()
            return slot.loading

    def _load(self, model: ResolvedModel, loading: Future[OpenModel]) -> None:
        try:
            loading.set_result(self.open(model))
        except BaseException as error:  # noqa: BLE001 - raised in whoever awaits it
            loading.set_exception(error)

    def discard(self, model: ResolvedModel, opened: OpenModel) -> bool:
        """Forget `opened` if its engine has ended, so that the next `open` opens the model again. False if that would
        not help: the engine was another process's, before a fork."""
        if opened.process != os.getpid():
            return False
        with self._lock:
            slot = self._slots.get(model.path)
        if slot is not None:
            with slot.lock:
                if slot.opened is opened:
                    _close_dead(slot)
        return True

    def unload(self, name: str) -> bool:
        """Close a model and give back its memory; running requests fail. False if it was not open. It opens again when
        it is next used.

        Raises:
            NotFoundError: as `resolve`.
        """
        model = self.resolve(model_name(name))
        with self._lock:
            slot = self._slots.get(model.path)
        return slot is not None and _close(slot)

    def close(self) -> None:
        """Close every model. Idempotent; waits for one that is loading. Later requests fail.

        Raises what an engine's `close` raised, of several an ExceptionGroup, after all of them are closed.
        """
        with self._lock:
            self._closed = True
            slots = [*self._slots.values()]
        errors: list[Exception] = []
        for slot in slots:
            try:
                _close(slot)
            except Exception as error:  # noqa: BLE001 - the other engines must be closed too
                errors.append(error)
        if len(errors) == 1:
            raise errors[0]
        if errors:
            raise ExceptionGroup(f"{len(errors)} models failed while they were closed", errors)

    @property
    def closed(self) -> bool:
        return self._closed

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


def _close_dead(slot: _Slot) -> None:
    """Take an engine that has ended out of its slot; the caller holds the slot's lock."""
    opened, slot.opened = slot.opened, None
    if opened is not None:
        with contextlib.suppress(Exception):  # what ended it was raised in its requests
            opened.engine.close()


def read_config(path: Path | None) -> dict[str, Any]:
    """A checkpoint's config.json; empty if there is none that can be read, which opening it complains of."""
    with contextlib.suppress(OSError, ValueError):
        config = json.loads(path.joinpath("config.json").read_text("utf-8")) if path is not None else None
        if isinstance(config, dict):
            return config
    return {}


def model_name(name: Any) -> str:
    """A model's name as a text: as it is, or of a path. Raises BadRequestError for anything else."""
    if isinstance(name, Path):
        return str(name)
    if not isinstance(name, str) or not name:
        raise BadRequestError(
            f"Invalid 'model': must be a name or a directory, got {shown(name)}.", param="model", code="invalid_type"
        )
    return name


def _registered(name: str, path: Any) -> Path:
    """The absolute path of a registered directory, which need not exist yet."""
    if not isinstance(path, (str, os.PathLike)):
        raise OptionTypeError(f"models[{shown(name)}] must be a directory's path, got {shown(path)}")
    try:
        return Path(path).expanduser().absolute()
    except (RuntimeError, ValueError, OSError) as error:
        raise OptionValueError(f"models[{shown(name)}] is no path: {shown(path)} ({error})") from error


def _not_found(message: str) -> NotFoundError:
    return NotFoundError(message, param="model", code="model_not_found")
