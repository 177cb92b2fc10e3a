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

from cai_runtime.compress.stopwatch import Stopwatch
from cai_runtime.errors import CompressionError

FORMAT = 4  # raise it when what a step keeps, or how it comes about, changes
MANIFEST = "manifest.json"
LOCK = "lock"
RECORD = "record"  # metadata entry of a step's file
SECONDS = "seconds.json"  # nothing that results depend on


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
                if any(entry.name != LOCK for entry in directory.iterdir()):
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

    def close(self) -> None:
        """Let another process use the directory; one without results is removed. Idempotent."""
        if not self._lock.closed and {entry.name for entry in self.directory.iterdir()} <= {LOCK, MANIFEST, SECONDS}:
            shutil.rmtree(self.directory, ignore_errors=True)
        self._lock.close()

    def remove(self) -> None:
        """Remove the directory."""
        shutil.rmtree(self.directory, ignore_errors=True)
        self._lock.close()

    def _file(self, step: str) -> Path:
        return self.directory / f"{step}.safetensors"


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
    """All of a file or nothing, also when the power fails."""
    partial = file.with_name(f"{file.name}.partial")
    with partial.open("wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    partial.replace(file)


def _difference(begun: str, wanted: str) -> str:
    """Names of the top entries that differ, for the message."""
    try:
        old, new = json.loads(begun), json.loads(wanted)
        names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    except (ValueError, AttributeError):
        return "its manifest is damaged"
    return ", ".join(names)


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes, hexadecimal."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data).hexdigest()
