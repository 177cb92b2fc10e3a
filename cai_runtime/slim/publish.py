"""Gives a finished directory its final name, in one step where the system can."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import sys
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def publish(tmp: Path, dst: Path) -> None:
    """Rename `tmp` to `dst`, its sibling; an existing directory `dst` is replaced, and removed only after that.

    On Linux the two are exchanged in one step (renameat2). Elsewhere, or on a file system without it, the old
    directory is moved aside first and moved back if the second rename fails. Raises OSError; `dst` is then what it was.
    """
    sync_directory(tmp)
    old: Path | None = None
    if not dst.exists():
        tmp.rename(dst)
    elif _exchange(tmp, dst):
        old = tmp
    else:
        old = dst.with_name(f".{dst.name}.{secrets.token_hex(4)}.old")
        dst.rename(old)
        try:
            tmp.rename(dst)
        except OSError:
            old.rename(dst)
            raise
    # The new directory is in place; a file system that can't sync a directory is no reason to call that a failure.
    with contextlib.suppress(OSError):
        sync_directory(dst.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def sync_directory(path: Path) -> None:
    """Make the directory's entries durable. Windows has no such call for directories; there it does nothing."""
    if sys.platform == "win32":
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names atomically; False where the system can't."""
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    done = renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), ctypes.c_uint(_RENAME_EXCHANGE))
    return done == 0
