"""Cache entries under `cai_home()`: built once, under a lock, put in place by one rename, and checked at every use.

An entry is a directory with a receipt, `.cai_receipt.json`, that lists every file with its size, modification time and
SHA-256. A file whose size differs is damaged; one whose time differs is hashed again. A damaged entry is rebuilt.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cai_runtime.errors import SourceError
from cai_runtime.home import cai_home

RECEIPT = ".cai_receipt.json"
PIECE = 16 << 20  # bytes that are hashed at a time

logger = logging.getLogger(__name__)


def tqdm_disable(progress: bool | None) -> bool | None:
    """`progress` as tqdm's `disable` argument: None there means "off unless stderr is a terminal"."""
    return None if progress is None else not progress


def sha256_of(path: Path, tick: Callable[[int], object] = lambda _: None) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits. tick: called with numbers of bytes that are done."""
    found = hashlib.sha256()
    with path.open("rb") as f:
        while piece := f.read(PIECE):
            found.update(piece)
            tick(len(piece))
    return found.hexdigest()


def entry_path(kind: str, name: str, identity: str) -> Path:
    """Directory of the entry that holds `identity`: `<home>/<kind>/<name>-<hash of identity>`."""
    slug = re.sub(r"[^A-Za-z0-9._=-]+", "-", name).strip("-.")[:80] or "entry"
    return cai_home() / kind / f"{slug}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"


def entry(
    kind: str,
    name: str,
    identity: str,
    build: Callable[[Path], object],
    *,
    force: bool = False,
    keep_partial: bool = False,
) -> Path:
    """Return the directory of a cache entry, building it when it is absent or damaged, or when `force` is set.

    `build(directory)` fills an empty temporary directory beside the entry; when it returns, a receipt is written and
    the directory is renamed into place, so that a reader never sees half an entry. One process builds at a time; the
    others wait and then find the result. When `build` raises, the temporary directory is removed, or, with
    `keep_partial`, left for the next call to continue in.

    Raises whatever `build` raises, and SourceError when the cache can't be written.
    """
    path = entry_path(kind, name, identity)
    if not force and damage(path) is None:
        return path
    with _lock(path):
        found = damage(path)
        if not force:
            if found is None:
                return path  # another process built it while this one waited
            if path.exists():
                logger.warning("cache entry %s is damaged (%s): making it again", path, found)
        partial = path.with_name(f".{path.name}.partial")
        # Whoever left this directory behind is gone: we hold the lock.
        if partial.exists() and (force or not keep_partial):
            shutil.rmtree(partial)
        try:
            partial.mkdir(parents=True, exist_ok=True)
            build(partial)
            write_receipt(partial, identity)
            _put_in_place(partial, path)
        except OSError as e:
            raise SourceError(f"can't write the cache entry {path}: {e}; free space there or set CAI_HOME") from e
        finally:
            if partial.exists() and not keep_partial:
                shutil.rmtree(partial, ignore_errors=True)
    return path


def damage(path: Path) -> str | None:
    """What is wrong with the entry at `path`, in words; None when it is whole."""
    try:
        files = json.loads((path / RECEIPT).read_text())["files"]
        for name, want in files.items():
            stat = (path / name).stat()
            if stat.st_size != want["size"]:
                return f"{name} has {stat.st_size} bytes, not {want['size']}"
            if stat.st_mtime_ns != want["mtime_ns"] and sha256_of(path / name) != want["sha256"]:
                return f"{name} has changed"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        return str(e) or type(e).__name__
    return None


def write_receipt(path: Path, identity: str) -> None:
    """Write the receipt of a finished entry."""
    files = {}
    for file in sorted(p for p in path.rglob("*") if p.is_file() and p.name != RECEIPT):
        stat = file.stat()
        files[file.relative_to(path).as_posix()] = {
            "size": stat.st_size,
            "mtime_ns": stat.st_mtime_ns,
            "sha256": sha256_of(file),
        }
    (path / RECEIPT).write_text(json.dumps({"identity": identity, "files": files}, indent=1))


def copy_entry(src: Path, out: Path, *, force: bool = False) -> Path:
    """Copy the directory `src` to `out`, whole or not at all, links followed and the receipt left behind.

    Raises SourceError when `out` exists and is not empty, unless `force`, which replaces it.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not force:
        raise SourceError(f"{out} already exists; choose another directory or pass --force (force=True) to replace it")
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(src, partial, ignore=shutil.ignore_patterns(RECEIPT))
        _put_in_place(partial, out)
    except (OSError, shutil.Error) as e:
        raise SourceError(f"can't write {out}: {e}") from e
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _put_in_place(partial: Path, path: Path) -> None:
    """Rename `partial` to `path`; what was there is moved aside first (rename can't replace a full directory)."""
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    if path.is_dir() and not path.is_symlink():
        path.replace(old)
    elif path.exists():
        path.unlink()
    partial.replace(path)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock_file = cai_home() / "locks" / f"{path.parent.name}-{path.name}.lock"
    try:
        lock_file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(lock_file)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.warning("waiting for another process that is making %s", path)
            lock.acquire()
    except OSError as e:
        raise SourceError(f"can't lock the cache at {lock_file}: {e}; set CAI_HOME to a directory you can write") from e
    try:
        yield
    finally:
        lock.release()
