"""How many threads the CPU kernels should use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def usable_processors(root: Path = Path("/")) -> int:
    """The processors that this process may run on, within the CPU quota of its control groups, rounded up; at least 1.

    Threads beyond a quota (docker's --cpus, a Kubernetes limit) are stopped in the middle of a pass, and the others wait
    for them. Two hyperthreads of a core count as two: measure, and set `CAI_NUM_THREADS`, where one a core is faster.

    root: of the file system, for tests.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for quota in _quotas(root):
        count = min(count, -(-quota[0] // quota[1]))
    return max(count, 1)


def _quotas(root: Path) -> Iterator[tuple[int, int]]:
    """(microseconds, of so many) for every control group above this process that has a quota."""
    for controllers, group in _groups(root):
        if controllers == "":  # version 2: one hierarchy
            for folder in _upwards(root / "sys/fs/cgroup", group):
                yield from _quota(_words(folder / "cpu.max"))
        elif "cpu" in controllers.split(","):
            for name in {"cpu", controllers}:  # the hierarchy is mounted under one name or both
                for folder in _upwards(root / "sys/fs/cgroup" / name, group):
                    yield from _quota(_words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us"))


def _groups(root: Path) -> Iterator[tuple[str, str]]:
    """The controllers and the path of each group of this process; see cgroups(7)."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        parts = line.split(":", 2)
        if len(parts) == 3:
            yield parts[1], parts[2]


def _upwards(mount: Path, group: str) -> Iterator[Path]:
    """A group's folder and those above it. In a container the path may be the host's, and only the mount is there."""
    folder = mount / group.lstrip("/")
    yield folder
    while folder != mount and mount in folder.parents:
        folder = folder.parent
        yield folder


def _quota(words: list[str]) -> Iterator[tuple[int, int]]:
    """Of "200000 100000"; nothing of "max 100000", "-1 100000" or a file that is not there."""
    if len(words) == 2 and words[0].isdigit() and words[1].isdigit() and int(words[1]) > 0:
        yield int(words[0]), int(words[1])


def _words(path: Path) -> list[str]:
    return _read(path).split()


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
