"""The work directory: results of finished steps on disk, from which a killed compression resumes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch

from cai_runtime.compressor.stopwatch import Stopwatch
from cai_runtime.errors import CompressionError

FORMAT = 4  # raise it when the contents of a step, or their computation, change
MANIFEST = "manifest.json"
LOCK = "lock"
RECORD = "record"  # metadata entry of a step's file
SECONDS = "seconds.json"  # wall times; results do not depend on it
SUFFIX, PARTIAL = ".safetensors", ".partial"  # of a step's file; of any file while it is written


def work_directory(dst: Path) -> Path:
    """The work directory of a compression to `dst`, an absolute path."""
    return dst.parent / f".{dst.name}.work"


def was_begun(directory: Path, step: str | None = None) -> bool:
    """Whether the work directory, or a step in it, exists. False also for a path that can't exist (name too long)."""
    with suppress(OSError):
        return (directory if step is None else directory / f"{step}{SUFFIX}").exists()
    return False


def bytes_held(directory: Path) -> int:
    """Bytes of the files in a work directory; 0 without one."""
    with suppress(OSError):
        return sum(entry.stat().st_size for entry in directory.iterdir())
    return 0


class Work:
    """A locked directory of steps. A step is one file of named tensors and a JSON record, written atomically.

    directory: created if missing. key: JSON of everything that results depend on (options, source hashes, versions).
    restart: empty the directory first. Attribute `watch`: a stopwatch that includes earlier calls; saved with every step.

    Raises CompressionError when the directory has another key, holds something else, is locked or can't be written.
    """

    def __init__(self, directory: Path, key: dict[str, Any], *, restart: bool = False):
        self.directory = directory
        self.watch = Stopwatch()
        text = json.dumps({"format": FORMAT, **key}, sort_keys=True, indent=1)
        manifest = directory / MANIFEST
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(directory / LOCK)
            if restart:
                for entry in directory.iterdir():
                    if entry.name != LOCK:
                        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            if not manifest.exists():
                if any(entry.name not in (LOCK, _partial(manifest).name) for entry in directory.iterdir()):
                    raise CompressionError(
                        f"{directory} holds something else than an unfinished compression: remove it"
                    )
                _write(manifest, text.encode())
            elif (begun := manifest.read_text()) != text:
                raise CompressionError(
                    f"{directory} holds an unfinished compression with other options ({_difference(begun, text)}): "
                    "restart it (--restart), or remove the directory"
                )
            with suppress(OSError, ValueError):  # without the file, times start at 0
                self.watch = Stopwatch(json.loads((directory / SECONDS).read_text()))
        except OSError as e:
            raise CompressionError(f"the work directory {directory} can't be used: {e.strerror or e}") from e

    def has(self, step: str) -> bool:
        """Whether the step is finished."""
        return self._file(step).exists()

    def save(self, step: str, tensors: dict[str, torch.Tensor], record: Any = None, *, again: bool = False) -> None:
        """Write a step. tensors: on any device. record: JSON. again: replace an existing step; otherwise it stays.

        Raises CompressionError when the step can't be written.
        """
        from safetensors.torch import save

        if self.has(step) and not again:
            return

        data = save(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            metadata={RECORD: json.dumps(record)},
        )
        try:
            self._file(step).parent.mkdir(exist_ok=True)
            _write(self._file(step), data)
            _write(self.directory / SECONDS, json.dumps(self.watch.seconds()).encode())
        except OSError as e:
            raise CompressionError(
                f"{self._file(step)} can't be written: {e.strerror or e}; what is finished is "
                "kept, run the same command again"
            ) from e

    def load(self, step: str) -> tuple[dict[str, torch.Tensor], Any]:
        """A step's tensors, on the CPU, and its record. Raises CompressionError when the step can't be read."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._file(step), framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return tensors, json.loads((file.metadata() or {}).get(RECORD, "null"))
        except (OSError, SafetensorError, ValueError) as e:
            raise CompressionError(
                f"{self._file(step)} can't be read ({e}): restart the compression (--restart)"
            ) from e

    def drop(self, step: str) -> None:
        """Delete a step, if it exists."""
        self._file(step).unlink(missing_ok=True)

    def keep_only(self, step: str) -> None:
        """Delete all steps but this one."""
        for file in self.directory.glob(f"*{SUFFIX}"):
            if file != self._file(step):
                file.unlink(missing_ok=True)

    def close(self) -> None:
        """Release the lock, and remove the directory if it has no steps. Idempotent."""
        with suppress(OSError):  # the user may have removed the directory
            names = {entry.name for entry in self.directory.iterdir() if not entry.name.endswith(PARTIAL)}
            if not self._lock.closed and names <= {LOCK, MANIFEST, SECONDS}:
                shutil.rmtree(self.directory, ignore_errors=True)
        self._lock.close()

    def remove(self) -> None:
        """Remove the directory. The steps go first, so that a kill leaves a directory without steps."""
        for file in self.directory.glob(f"*{SUFFIX}"):
            file.unlink(missing_ok=True)
        shutil.rmtree(self.directory, ignore_errors=True)
        self._lock.close()

    def _file(self, step: str) -> Path:
        return self.directory / f"{step}{SUFFIX}"


def _locked(file: Path) -> IO[bytes]:
    """The open, locked lock file. The system releases the lock when the process ends. Windows has no flock: no lock there.

    Raises CompressionError while another process holds the lock.
    """
    lock = file.open("ab")
    if sys.platform != "win32":
        import fcntl

        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise CompressionError(
                f"another process is compressing to the same place ({file.parent} is locked)"
            ) from None
    return lock


def _write(file: Path, data: bytes) -> None:
    """Write a file atomically, also across power failures. On OSError it removes the partial file and raises."""
    partial = _partial(file)
    try:
        with partial.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        partial.replace(file)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _partial(file: Path) -> Path:
    """The temporary name, always the same, so that a later write replaces what a killed process left."""
    return file.with_name(f"{file.name}{PARTIAL}")


def _difference(begun: str, wanted: str) -> str:
    """For the message: names of the entries that differ, such as options.keep."""

    def names(old: Any, new: Any, name: str) -> list[str]:
        if isinstance(old, dict) and isinstance(new, dict):
            entries = sorted({*old, *new})
            return [found for key in entries for found in names(old.get(key), new.get(key), f"{name}.{key}")]
        return [] if old == new else [name]

    try:
        return ", ".join(found.removeprefix(".") for found in names(json.loads(begun), json.loads(wanted), ""))
    except ValueError:
        return "its manifest is damaged"


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes, hexadecimal."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data).hexdigest()
