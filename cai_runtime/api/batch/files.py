"""The files of a batch: its input, read a line at a time, and its output, which a run that was killed goes on with.

A result is one whole line, appended by one write to the system: a killed process leaves whole lines, but for the last,
which may be torn. A result's id is a hash of its request's line. So the output itself says which requests are done, and
whether it belongs to this input.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Generator
from pathlib import Path
from typing import BinaryIO, Self

from cai_runtime.api.batch.lines import ID_PREFIX, BatchRequest, BatchResult, RequestReader, succeeded, too_long
from cai_runtime.errors import BatchFileError
from cai_runtime.scalars import shown

MAX_LINE = 256 * 2**20  # bytes of a line; images come inside of it
_BOM = b"\xef\xbb\xbf"
_HEAD = b'{"id": "' + ID_PREFIX.encode()  # how every line of an output begins


def read_lines(path: Path, reader: RequestReader) -> Generator[BatchRequest | BatchResult]:
    """The requests of a file, and the results of lines that are none. Blank lines are left out.

    Raises BatchFileError: the file can't be read.
    """
    for number, line in _raw_lines(path):
        yield reader.read(line, number) if len(line) <= MAX_LINE else too_long(line, number, MAX_LINE)


def count_lines(path: Path) -> int:
    """How many lines are not blank."""
    return sum(1 for _ in _raw_lines(path))


def _raw_lines(path: Path) -> Generator[tuple[int, bytes]]:
    """(number from 1, line) of each line that is not blank; of one that is too long a bit more than MAX_LINE bytes."""
    number = 0
    with _opened(path) as file:
        while line := _read(file, path):
            number += 1
            if number == 1:
                line = line.removeprefix(_BOM)
            rest = line
            while len(rest) > MAX_LINE and not rest.endswith(b"\n"):  # skip to the line's end
                rest = _read(file, path)
            if not line.isspace():
                yield number, line


def _read(file: BinaryIO, path: Path) -> bytes:
    try:
        return file.readline(MAX_LINE + 2)
    except OSError as error:
        raise BatchFileError(f"{path} can't be read: {error.strerror}") from error


def _opened(path: Path) -> BinaryIO:
    try:
        file = path.open("rb")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise BatchFileError(f"{shown(str(path), 400)} can't be read: {_reason(error)}") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise BatchFileError(f"{path} is no regular file: a batch's input is read twice; write it to a file first")
    return file


class OutputFile:
    """The output of a batch, open and locked: one process writes it at a time.

    Attributes:
        path: of the file.
        done: ids of the results that it held when it was opened.
        succeeded, failed: how many results it holds of each kind.
    """

    def __init__(self, path: Path, source: Path, reader: RequestReader):
        """Open an output, new or of an earlier run. Nothing in it changes before all of it is known to be this input's;
        then a torn last line is cut off, or completed if all of its JSON is there.

        Args:
            source: the input.
            reader: a new one, for the input.

        Raises:
            BatchFileError: see there.
        """
        self.path = path
        self.done: dict[str, str | None] = {}  # with their custom ids
        self.succeeded = self.failed = 0
        with _opened(source) as given:  # first: a bad input leaves no output behind
            self._file = _open_output(path)
            same = os.path.sameopenfile(self._file, given.fileno())
        try:
            if same:
                raise BatchFileError(f"{path} is the input: name another file for the output")
            _lock(self._file, path)
            self._end, torn = self._read_results()
            self._check_requests(source, reader)
            os.ftruncate(self._file, self._end)
            if torn is not None:
                self._append(torn)
        except BaseException:
            os.close(self._file)
            raise

    def _read_results(self) -> tuple[int, bytes | None]:
        """Note the results that the file holds. Returns the bytes of its whole lines, and the line to complete, if its last
        is whole but for the line's end."""
        end, number = 0, 0
        with os.fdopen(os.dup(self._file), "rb") as file:
            file.seek(0)
            for line in file:
                number += 1
                if line.endswith(b"\n"):
                    self._note(line, number)
                    end += len(line)
                    continue
                if not (line.startswith(_HEAD) or _HEAD.startswith(line)):
                    raise self._foreign(number)
                try:
                    json.loads(line)
                except ValueError:
                    return end, None
                self._note(line, number)
                return end, line + b"\n"
        return end, None

    def _note(self, line: bytes, number: int) -> None:
        try:
            result = json.loads(line)
            id, custom_id, ok = result["id"], result["custom_id"], succeeded(result)
        except (ValueError, KeyError, TypeError, RecursionError):
            raise self._foreign(number) from None
        if not (isinstance(id, str) and id.startswith(ID_PREFIX)):
            raise self._foreign(number)
        if id in self.done:
            raise BatchFileError(f"{self.path}, line {number}: this result is there twice; name another output file")
        self.done[id] = custom_id
        self._count(ok)

    def _foreign(self, number: int) -> BatchFileError:
        return BatchFileError(
            f"{self.path}, line {number}, is no result of `cai batch`: name another output file, which is not changed then"
        )

    def _check_requests(self, source: Path, reader: RequestReader) -> None:
        """Raises BatchFileError unless every result's request is in the input, as it was."""
        if not self.done:
            return
        left = dict(self.done)
        for line in read_lines(source, reader):
            left.pop(line.id if isinstance(line, BatchRequest) else line["id"], None)
        if left:
            id, custom_id = next(iter(left.items()))
            raise BatchFileError(
                f"{self.path} holds {len(left)} results of requests that are not in {source}, or not as they were, "
                f"the first with the custom_id {shown(custom_id)} ({id}): name another output file, or delete this one"
            )

    def append(self, result: BatchResult) -> None:
        """Write a result. Raises BatchFileError if the system refuses; the file then holds whole lines alone."""
        self._append(json.dumps(result).encode() + b"\n")  # in ASCII: whole lines for every reader
        self._count(succeeded(result))

    def _append(self, line: bytes) -> None:
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError as error:
            os.ftruncate(self._file, self._end)
            raise BatchFileError(
                f"{self.path} can't be written: {error.strerror}. It holds {self.succeeded + self.failed} whole results; "
                "with room for the others, the same call goes on from there"
            ) from error
        self._end += len(line)

    def _count(self, ok: bool) -> None:
        self.succeeded += ok
        self.failed += not ok

    def close(self) -> None:
        """Have the system write what it holds to the disk. Idempotent."""
        if self._file >= 0:
            file, self._file = self._file, -1
            try:
                os.fsync(file)
            except OSError as error:
                raise BatchFileError(f"{self.path} can't be written: {error.strerror}") from error
            finally:
                os.close(file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _open_output(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        file = os.open(path, flags, 0o666)
    except (OSError, ValueError) as error:
        raise BatchFileError(f"{shown(str(path), 400)} can't be written: {_reason(error)}") from error
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise BatchFileError(f"{path} is no regular file, so that a killed run could not go on with it: name a file")
    return file


def _lock(file: int, path: Path) -> None:
    """The system releases the lock with the file, however the process ends. Windows has no flock: no lock there."""
    if sys.platform == "win32":
        return
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BatchFileError(f"another process is writing to {path}: wait for it, or name another file") from None
    except OSError:  # this file system has no locks
        pass


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
