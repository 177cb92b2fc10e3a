"""Results of finished steps on disk, so that a compression that was killed goes on where it was."""

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

FORMAT = 4  # raise it when what a step keeps, or how it comes about, changes
MANIFEST = "manifest.json"
LOCK = "lock"
RECORD = "record"  # metadata entry of a step's file
SECONDS = "seconds.json"  # nothing that results depend on
SUFFIX, PARTIAL = ".safetensors", ".partial"  # of a step's file, of any file that is being written


def work_directory(dst: Path) -> Path:
    """Where the compression to `dst`, an absolute path, keeps its steps."""
    return dst.parent / f".{dst.name}.work"


def was_begun(directory: Path, step: str | None = None) -> bool:
    """Whether there is a work directory, or in it a step. False, too, where none can be: a name that is too long."""
    with suppress(OSError):
        return (directory if step is None else directory / f"{step}{SUFFIX}").exists()
    return False


def bytes_held(directory: Path) -> int:
    """Bytes of the files in a work directory; 0 without one."""
    with suppress(OSError):
        return sum(entry.stat().st_size for entry in directory.iterdir())
    return 0


class Work:
    """A directory of steps. A step is a file of named tensors with a JSON record, and is there whole or not at all.

    key: everything that the results depend on (options, source hash, versions), JSON. A directory that was begun with
    another key is refused, unless `restart`, which empties it. watch: goes on from the time that earlier calls took, and is
    kept with every step.

    Raises CompressionError when the directory belongs to something else or can't be written.
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
            with suppress(OSError, ValueError):  # without it, times begin anew
                self.watch = Stopwatch(json.loads((directory / SECONDS).read_text()))
        except OSError as e:
            raise CompressionError(f"the work directory {directory} can't be used: {e.strerror or e}") from e

    def has(self, step: str) -> bool:
        return self._file(step).exists()

    def save(self, step: str, tensors: dict[str, torch.Tensor], record: Any = None, *, again: bool = False) -> None:
        """Keep a step's result. tensors: on any device. One that is there already is the same and stays, unless `again`:
        then it is replaced."""
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
        """A step's tensors, on the CPU, and its record."""
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
        """Forget a step that nothing needs any more."""
        self._file(step).unlink(missing_ok=True)

    def keep_only(self, step: str) -> None:
        """Forget all steps but this one."""
        for file in self.directory.glob(f"*{SUFFIX}"):
            if file != self._file(step):
                file.unlink(missing_ok=True)

    def close(self) -> None:
        """Let another process use the directory; one without results is removed. Idempotent."""
        with suppress(OSError):  # it was removed by hand
            names = {entry.name for entry in self.directory.iterdir() if not entry.name.endswith(PARTIAL)}
            if not self._lock.closed and names <= {LOCK, MANIFEST, SECONDS}:
                shutil.rmtree(self.directory, ignore_errors=True)
        self._lock.close()

    def remove(self) -> None:
        """Remove the directory: the steps first, so that what a kill leaves is a directory without steps."""
        for file in self.directory.glob(f"*{SUFFIX}"):
            file.unlink(missing_ok=True)
        shutil.rmtree(self.directory, ignore_errors=True)
        self._lock.close()

    def _file(self, step: str) -> Path:
        return self.directory / f"{step}{SUFFIX}"


def _locked(file: Path) -> IO[bytes]:
    """The open lock file. Raises CompressionError while another process holds it; Windows has no such lock, nothing is
    held there. The system releases it with the process, however that ends."""
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
    """All of a file or nothing, also when the power fails. Raises OSError, and gives the space back."""
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
    """Always the same: what a killed process left is written over."""
    return file.with_name(f"{file.name}{PARTIAL}")


def _difference(begun: str, wanted: str) -> str:
    """Names of the entries that differ, such as options.keep, for the message."""

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
