"""Where audio comes from: paths, bytes, file objects, named contents, as one seekable file of bytes."""

from __future__ import annotations

import io
import os
import stat
import tempfile
from pathlib import Path
from typing import Any, BinaryIO

from cai_runtime.errors import AudioSourceError, EmptyAudioError

SPOOL_MEMORY = 32 << 20  # bytes of a stream that can't seek which are held in memory; more go to a temporary file
SPOOL_MOST = 16 << 30  # bytes taken from such a stream: ten hours of two channels at 96 kHz in 24 bits
CHUNK = 1 << 20


class ByteSource:
    """A seekable file of bytes, whose first byte is number 0, for decoders written in C.

    Such decoders can't pass an exception on: a failed read ends the file for them, and `check` raises it afterwards.
    It has no `name`: decoders would trust the suffix.
    """

    def __init__(self, file: BinaryIO, label: str, *, base: int = 0, owned: bool = True):
        """base: position in `file` of the first byte. owned: whether `close` closes `file`."""
        self.label = label  # names the input in messages
        self._file, self._base, self._owned = file, base, owned
        self._failure: BaseException | None = None
        self.note = f" behind position {base}: seek(0) goes back to its start" if base else ""
        self.size = self.seek(0, os.SEEK_END)
        self.seek(0)
        self.check()

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes, fewer only at the end."""
        try:
            data = self._file.read(size)
            while 0 < len(data) < size and (more := self._file.read(size - len(data))):
                data += more
            return data
        except BaseException as e:  # noqa: BLE001 - raised by `check`
            self._failure = self._failure or e
            return b""

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """The new position. Before the first byte there is none."""
        try:
            if whence == os.SEEK_SET:
                return self._file.seek(self._base + max(offset, 0)) - self._base
            at = self._file.seek(offset, whence) - self._base
            return at if at >= 0 else self._file.seek(self._base) - self._base
        except BaseException as e:  # noqa: BLE001 - raised by `check`
            self._failure = self._failure or e
            return 0

    def tell(self) -> int:
        try:
            return self._file.tell() - self._base
        except BaseException as e:  # noqa: BLE001 - raised by `check`
            self._failure = self._failure or e
            return 0

    def head(self, size: int) -> bytes:
        """The first bytes; the position is then at the start."""
        self.seek(0)
        data = self.read(size)
        self.seek(0)
        self.check()
        return data

    def check(self) -> None:
        """Raise what a read failed with: AudioSourceError for an ordinary exception, anything else as it was."""
        failure, self._failure = self._failure, None
        if isinstance(failure, Exception):
            raise AudioSourceError(f"{self.label} can't be read: {type(failure).__name__}: {failure}") from failure
        if failure is not None:
            raise failure

    def close(self) -> None:
        if self._owned:
            self._file.close()


def open_bytes(source: object, name: str | None = None) -> ByteSource:
    """Any source but an array as a ByteSource.

    source: a path; bytes; a binary file object, read from its position on and left open; or (name, one of these[, content
    type[, headers]]) as the openai client takes it. The name serves messages alone.
    name: overrides the source's own.

    Raises AudioSourceError and EmptyAudioError (no bytes).
    """
    if isinstance(source, tuple):
        if not 2 <= len(source) <= 4 or not isinstance(source[0], str | None):
            raise AudioSourceError(
                "a tuple of audio is (name, content), with a content type behind if wanted: "
                f"this one is ({', '.join(type(part).__name__ for part in source)})"
            )
        name, source = name or source[0], source[1]
    if isinstance(source, str | os.PathLike):
        found = _of_path(source, name)
    elif isinstance(source, bytes | bytearray | memoryview):
        found = ByteSource(
            io.BytesIO(source if isinstance(source, bytes) else bytes(source)),
            name or f"the audio of {len(source)} bytes",
        )
    elif callable(getattr(source, "read", None)):
        found = _of_file(source, name)
    else:
        raise AudioSourceError(
            f"audio can't come from {type(source).__name__}: give a path, bytes, a binary file object, (name, bytes), "
            "or a numpy array with its rate"
        )
    if not found.size:
        found.close()
        raise EmptyAudioError(f"{found.label} is empty: 0 bytes{found.note}")
    return found


def _of_path(source: str | os.PathLike[str], name: str | None) -> ByteSource:
    label = name or os.fspath(source)
    try:
        path = Path(source).expanduser()
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise AudioSourceError(f"{label} is a directory: give one audio file")
        if stat.S_ISFIFO(mode):
            with path.open("rb") as stream:
                return _spooled(stream, label)
        if not stat.S_ISREG(mode):
            raise AudioSourceError(f"{label} is a device or a socket: give an audio file")
        return ByteSource(path.open("rb", buffering=1 << 16), label)
    except FileNotFoundError as e:
        note = ": download it first, nothing is fetched from here" if "://" in str(label) else ""
        raise AudioSourceError(f"audio file {label} is not there{note}") from e
    except (OSError, ValueError, RuntimeError, TypeError) as e:
        # ValueError: a NUL in the path. RuntimeError: no home for ~. TypeError: a path of bytes.
        raise AudioSourceError(f"audio file {label!r} can't be opened: {e}") from e


def _of_file(file: Any, name: str | None) -> ByteSource:
    own = getattr(file, "name", None)
    label = name or (own if isinstance(own, str) else f"the {type(file).__name__} object")
    if isinstance(file, io.TextIOBase):
        raise AudioSourceError(f"{label} is open as text: open it in binary mode, 'rb'")
    try:
        base = file.tell() if file.seekable() else None
    except Exception:  # noqa: BLE001 - an object that has read alone is enough
        base = None
    if base is None:
        return _spooled(file, label)
    return ByteSource(file, label, base=base, owned=False)


def _spooled(stream: Any, label: str) -> ByteSource:
    """The rest of a stream that can't seek, copied."""
    spool = tempfile.SpooledTemporaryFile(max_size=SPOOL_MEMORY)  # noqa: SIM115 - the ByteSource closes it
    try:
        size = 0
        while True:
            chunk = stream.read(CHUNK)
            if not isinstance(chunk, bytes | bytearray | memoryview):
                if hasattr(chunk, "close"):
                    chunk.close()  # of a coroutine, which would complain that nobody awaited it
                raise AudioSourceError(
                    f"{label} gives {type(chunk).__name__}, not bytes: open it in binary mode, not async"
                )
            if not chunk:
                return ByteSource(spool, label)  # type: ignore[arg-type]
            size += len(chunk)
            if size > SPOOL_MOST:
                raise AudioSourceError(f"{label} gives more than {SPOOL_MOST >> 30} GiB: save it to a file first")
            spool.write(chunk)
    except AudioSourceError:
        spool.close()
        raise
    except Exception as e:
        spool.close()
        raise AudioSourceError(f"{label} can't be read: {type(e).__name__}: {e}") from e
    except BaseException:
        spool.close()
        raise
