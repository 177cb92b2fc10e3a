"""Threads within the quota of a control group, over a made-up /proc and /sys."""

import os

import pytest

from cai_runtime.kernels.processors import usable_processors


@pytest.fixture(autouse=True)
def sixteen_processors(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)


def write(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize(
    "files, expected",
    [
        ({}, 16),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 16),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}, 3),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "10000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "9900000 100000\n"}, 16),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000",
          "sys/fs/cgroup/a/cpu.max": "500000 100000"}, 5),
        ({"proc/self/cgroup": "0::/host/only\n", "sys/fs/cgroup/cpu.max": "400000 100000"}, 4),
        ({"proc/self/cgroup": "5:memory:/x\n3:cpu,cpuacct:/docker/1\n",
          "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "150000\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "50000\n"}, 3),
        ({"proc/self/cgroup": "3:cpu,cpuacct:/docker/1\n",
          "sys/fs/cgroup/cpu/docker/1/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/docker/1/cpu.cfs_period_us": "9"}, 16),
        ({"proc/self/cgroup": "3:cpu,cpuacct:/x\n", "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "100000",
          "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000"}, 1),
        ({"proc/self/cgroup": "0::/../x\nrubbish\n", "sys/fs/cgroup/cpu.max": "what\n"}, 16),
    ],
)  # fmt: skip
def test_quota(tmp_path, files, expected):
    write(tmp_path, files)
    assert usable_processors(tmp_path) == expected


def test_affinity_counts_without_a_quota(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 7}, raising=False)
    assert usable_processors(tmp_path) == 3


def test_this_machine():
    assert usable_processors() >= 1
