"""Where a checkpoint may be written, and the hidden directories beside it in which it is made."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import sys
from pathlib import Path

from cai_runtime.errors import CheckpointWriteError
from cai_runtime.slim.reader import CONFIG_FILE

LONGEST_NAME = 255 - len("..01234567.partial")  # of a directory that has hidden ones of longer names beside it


def destination(dst: str | Path) -> Path:
    """The path made absolute, without `.` and `..`, so that its name is that of a directory. Links stay as they are."""
    return Path(os.path.abspath(dst))  # noqa: PTH100


def check_destination(dst: Path, *, source: Path | None = None, overwrite: bool = False) -> None:
    """dst: see `destination`. source: the directory that is read for it.

    Raises CheckpointWriteError when the place is taken: by anything, or, with `overwrite`, by something that is not a
    checkpoint; or when the source would be lost, or have the result inside.
    """
    if "\0" in str(dst):
        raise CheckpointWriteError("a path can't have a NUL character", file=repr(str(dst)))
    if source is not None:
        # Not Path.resolve, which raises RuntimeError for links in a circle.
        place, origin = Path(os.path.realpath(dst)), Path(os.path.realpath(source))
        if place == origin:
            raise CheckpointWriteError("is the source itself; choose another destination", file=dst)
        if place.is_relative_to(origin) or origin.is_relative_to(place):
            how = "lies inside the source" if place.is_relative_to(origin) else "has the source inside"
            raise CheckpointWriteError(f"{how}, {source}; choose another destination", file=dst)
    if len(os.fsencode(dst.name)) > LONGEST_NAME:
        raise CheckpointWriteError(f"has a name of more than {LONGEST_NAME} bytes", file=dst)
    if not os.path.lexists(dst):
        return
    if not dst.is_dir() or dst.is_symlink():
        raise CheckpointWriteError("exists and is not a directory; choose another destination", file=dst)
    if not any(dst.iterdir()):
        return
    if not overwrite:
        raise CheckpointWriteError("exists and is not empty; choose another destination or overwrite it", file=dst)
    if not ((dst / CONFIG_FILE).is_file() and any(dst.glob("*.safetensors"))):
        raise CheckpointWriteError(
            "is not a checkpoint, and what it holds would be lost; choose another destination, or empty it first",
            file=dst,
        )


class PartialDirectory:
    """A new hidden directory beside `dst`. Those that killed processes left there are removed first: a living one holds a
    lock on its own. Raises OSError."""

    def __init__(self, dst: Path):
        dst.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(dst)
        self.path = dst.with_name(f".{dst.name}.{secrets.token_hex(4)}.partial")
        self.path.mkdir()
        self._lock = _locked(self.path)

    def remove(self) -> None:
        """Remove what lies under its name by now, and let go. Idempotent."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _remove_abandoned(dst: Path) -> None:
    name = re.compile(rf"\.{re.escape(dst.name)}\.[0-9a-f]{{8}}\.partial")
    for entry in dst.parent.iterdir():
        if name.fullmatch(entry.name) and (lock := _locked(entry)) is not None:
            shutil.rmtree(entry, ignore_errors=True)
            os.close(lock)


def _locked(directory: Path) -> int | None:
    """A descriptor that holds the directory's lock until it is closed; None where another process has it, or the system or
    the file system has no such lock. It is let go with the process, however that ends."""
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
