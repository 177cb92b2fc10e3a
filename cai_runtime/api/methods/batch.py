"""`client.batch` and its twin for asyncio."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterable, Coroutine, Generator, Iterable, Mapping, Sized
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from cai_runtime.api.batch.files import OutputFile, count_lines, read_lines
from cai_runtime.api.batch.lines import BatchRequest, RequestReader
from cai_runtime.api.batch.results import AsyncBatchResults, BatchResults, Line, Window
from cai_runtime.api.batch.serve import ENDPOINTS, BatchServer
from cai_runtime.api.host import ModelHost
from cai_runtime.api.responses.store import ResponseStore
from cai_runtime.errors import OptionTypeError, OptionValueError
from cai_runtime.progress import NoBar, progress_bar
from cai_runtime.scalars import as_bool, as_integer, shown

FilePath = str | os.PathLike[str]
Requests = Iterable[Mapping[str, Any] | str | bytes]
AsyncRequests = AsyncIterable[Mapping[str, Any] | str | bytes]


@dataclass(frozen=True)
class BatchSummary:
    """What an output holds at the end of a run.

    Attributes:
        output: the file.
        succeeded: results with the status code 200.
        failed: results with another one, and those of lines that are no requests.
        resumed: of all results, those that an earlier run had written.
    """

    output: Path
    succeeded: int
    failed: int
    resumed: int

    @property
    def total(self) -> int:
        return self.succeeded + self.failed


class _Batching:
    _host: ModelHost
    _responses: ResponseStore
    _timeout: float | None

    def _server(self) -> BatchServer:
        return BatchServer(self._host, self._responses, self._timeout)

    def _window(self, ordered: Any, window: Any) -> Window:
        flag, size = as_bool(ordered), as_integer(window)
        if flag is None:
            raise OptionTypeError(f"ordered must be True or False, got {shown(ordered)}")
        if window is not None and size is None:
            raise OptionTypeError(f"window must be an integer of at least 1, got {shown(window)}")
        if size is not None and size < 1:
            raise OptionValueError(f"window must be an integer of at least 1, got {shown(window)}")
        # While one batch runs in the engine, the next one is rendered, tokenized and queued.
        return Window(2 * max(self._host.max_batch, 4) if size is None else size, flag)


class Batching(_Batching):
    """Gives a client `batch`."""

    @overload
    def batch(
        self,
        source: FilePath,
        output: FilePath,
        *,
        ordered: bool = False,
        window: int | None = None,
        progress: bool | None = None,
    ) -> BatchSummary: ...
    @overload
    def batch(
        self,
        source: FilePath | Requests,
        output: None = None,
        *,
        ordered: bool = False,
        window: int | None = None,
        progress: bool | None = None,
    ) -> BatchResults: ...
    def batch(
        self,
        source: FilePath | Requests,
        output: FilePath | None = None,
        *,
        ordered: bool = False,
        window: int | None = None,
        progress: bool | None = None,
    ) -> BatchSummary | BatchResults:
        """Answer many requests, as many at once as keep the engine busy. Nothing is held but those under way.

        Args:
            source: a JSON Lines file in OpenAI's batch format, or an iterable of such lines or of the same as mappings:
                `{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}`.
            output: a file that the results are appended to. A run that was stopped or killed goes on when it is called
                again: what the file holds is not done again. `source` must be a file then. Default: no file; the
                results are returned.
            ordered: give results in the order of the requests. Results that come before their turn wait in memory, and
                are lost to a killed run. Default: as they come.
            window: requests under way at once. Default: twice the engine's `max_batch`.
            progress: show a bar. None: on a terminal only, and not where results are returned.

        Returns:
            With `output`, a BatchSummary at the end. Without, an iterator of results in OpenAI's output format, as dicts:
            a request's `custom_id` with its `response` (`status_code` and `body`, an error's too), or for lines that are
            no requests with `error`. What is wrong with one request stops no other.

        Raises:
            BatchFileError: a file can't be read or written, or `output` is not of this input.
            APIError: the client was closed meanwhile.
            TypeError, ValueError: an argument is none of these.
        """
        path, into = _paths(source, output)
        size = self._window(ordered, window)
        show = _shown(progress)
        if into is None:
            lines = _lines(source) if path is None else read_lines(path, RequestReader(ENDPOINTS))
            return BatchResults(lines, self._server(), size, _results_bar(show, source))
        assert path is not None
        with OutputFile(into, path, RequestReader(ENDPOINTS)) as file:
            resumed = len(file.done)
            bar = _file_bar(show, path, resumed)
            with BatchResults(_left(path, file), self._server(), size, bar) as results:
                for result in results:
                    file.append(result)
            return BatchSummary(into, file.succeeded, file.failed, resumed)


class AsyncBatching(_Batching):
    """Gives an asynchronous client `batch`."""

    @overload
    def batch(
        self,
        source: FilePath,
        output: FilePath,
        *,
        ordered: bool = False,
        window: int | None = None,
        progress: bool | None = None,
    ) -> Coroutine[Any, Any, BatchSummary]: ...
    @overload
    def batch(
        self,
        source: FilePath | Requests | AsyncRequests,
        output: None = None,
        *,
        ordered: bool = False,
        window: int | None = None,
        progress: bool | None = None,
    ) -> AsyncBatchResults: ...
    def batch(
        self,
        source: FilePath | Requests | AsyncRequests,
        output: FilePath | None = None,
        *,
        ordered: bool = False,
        window: int | None = None,
        progress: bool | None = None,
    ) -> Coroutine[Any, Any, BatchSummary] | AsyncBatchResults:
        """As `Client.batch`: with `output` await it; without, go through the results with `async for`. `source` may be an
        asynchronous iterable, too."""
        path, into = _paths(source, output)
        size = self._window(ordered, window)
        show = _shown(progress)
        if into is None:
            file_lines = None if path is None else read_lines(path, RequestReader(ENDPOINTS))
            lines = _lines_async(source) if file_lines is None else _awaited(file_lines)
            return AsyncBatchResults(lines, self._server(), size, _results_bar(show, source))
        assert path is not None
        return self._write(path, into, size, show)

    async def _write(self, path: Path, into: Path, window: Window, show: bool | None) -> BatchSummary:
        with await asyncio.to_thread(OutputFile, into, path, RequestReader(ENDPOINTS)) as file:
            resumed = len(file.done)
            bar = await asyncio.to_thread(_file_bar, show, path, resumed)
            async with AsyncBatchResults(_awaited(_left(path, file)), self._server(), window, bar) as results:
                async for result in results:
                    file.append(result)
            return BatchSummary(into, file.succeeded, file.failed, resumed)


def _paths(source: Any, output: Any) -> tuple[Path | None, Path | None]:
    """Both as paths; None of a source that is an iterable. Raises OptionTypeError."""
    if output is not None and not isinstance(output, (str, os.PathLike)):
        raise OptionTypeError(f"output must be a path, got {shown(output)}")
    if isinstance(source, (str, os.PathLike)):
        return Path(source), None if output is None else Path(output)
    if isinstance(source, (Mapping, bytes)) or not isinstance(source, (Iterable, AsyncIterable)):
        raise OptionTypeError(f"a batch's source must be a path or an iterable of requests, got {shown(source)}")
    if output is not None:
        raise OptionTypeError(
            "with an output file the source must be a file, too, so that a run that was killed can go on: write the "
            "requests to a file, a JSON object a line, or go through the results of batch(requests) yourself"
        )
    return None, None


def _shown(progress: Any) -> bool | None:
    if progress is not None and as_bool(progress) is None:
        raise OptionTypeError(f"progress must be True, False or None, got {shown(progress)}")
    return None if progress is None else bool(progress)


def _lines(source: Any) -> Generator[Line]:
    reader = RequestReader(ENDPOINTS, "Request")
    for number, item in enumerate(source, start=1):
        yield reader.read(item, number)


async def _lines_async(source: Any) -> AsyncGenerator[Line]:
    if not isinstance(source, AsyncIterable):
        async for line in _awaited(_lines(source)):
            yield line
        return
    reader, number = RequestReader(ENDPOINTS, "Request"), 0
    async for item in source:
        number += 1
        yield reader.read(item, number)


async def _awaited(lines: Generator[Line]) -> AsyncGenerator[Line]:
    with closing(lines):
        for line in lines:
            yield line


def _left(path: Path, file: OutputFile) -> Generator[Line]:
    """The lines of an input that have no result yet."""
    for line in read_lines(path, RequestReader(ENDPOINTS)):
        if (line.id if isinstance(line, BatchRequest) else line["id"]) not in file.done:
            yield line


def _results_bar(show: bool | None, source: Any) -> Any:
    """A bar for results that a caller goes through, who may print them: only where it is asked for."""
    if not show:
        return NoBar()
    total = len(source) if isinstance(source, Sized) and not isinstance(source, str) else None
    return progress_bar("batch", total=total, unit="req", show=True)


def _file_bar(show: bool | None, path: Path, resumed: int) -> Any:
    if show is False:
        return NoBar()
    return progress_bar("batch", total=count_lines(path), unit="req", show=show, initial=resumed)
