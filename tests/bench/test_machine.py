"""The description of the machine beside a measurement."""

from cai_runtime.bench.machine import describe_machine
from cai_runtime.kernels import processors


def test_usable_threads_stay_within_the_cpu_quota(monkeypatch):
    monkeypatch.setattr(processors, "_quotas", lambda root: iter([(50_000, 100_000)]))  # half a processor
    assert describe_machine()["usable_threads"] == 1
