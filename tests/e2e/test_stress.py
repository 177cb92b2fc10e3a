"""Many threads, aborts, bad requests and a cache too small for them all: nothing is lost, and all memory comes back."""

from __future__ import annotations

import ctypes
import gc
import random
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

import cai_runtime
from cai_runtime.errors import CaiError

REQUESTS, THREADS, ROUNDS = 120, 16, 4

pytestmark = pytest.mark.slow


def run_round(client: cai_runtime.Client, seed: int) -> dict[str, int]:
    counts = {"good": 0, "bad": 0, "aborted": 0}
    failures: list[str] = []
    lock = threading.Lock()
    todo = list(range(REQUESTS))

    def one(number: int) -> str:
        rng = random.Random(seed * 1000 + number)
        messages = [
            {"role": "user", "content": "Count: " + " ".join(str(rng.randrange(99)) for _ in range(rng.randrange(40)))}
        ]
        kind = rng.choices(["good", "bad", "aborted"], [70, 15, 15])[0]
        if kind == "good":
            reply = client.chat.completions.create(messages=messages, max_tokens=rng.randrange(1, 6), seed=number)
            assert reply.choices[0].finish_reason in ("stop", "length")
        elif kind == "bad":
            bad = rng.choice(
                [
                    {"temperature": 3},
                    {"max_tokens": 0},
                    {"frobnicate": 1},
                    {"messages": []},
                    {"messages": [{"role": "user", "content": "long " * 4000}]},
                ]
            )
            with pytest.raises(cai_runtime.BadRequestError):
                client.chat.completions.create(**{"messages": messages, "max_tokens": 4, **bad})
        else:
            stream = client.chat.completions.create(messages=messages, max_tokens=64, stream=True)
            for _, _chunk in zip(range(rng.randrange(1, 4)), stream, strict=False):
                pass
            stream.close()
        return kind

    def worker() -> None:
        while True:
            with lock:
                if not todo:
                    return
                number = todo.pop()
            try:
                kind = one(number)
            except (AssertionError, CaiError) as e:
                with lock:
                    failures.append(f"request {number}: {e!r}")
            else:
                with lock:
                    counts[kind] += 1

    threads = [threading.Thread(target=worker) for _ in range(THREADS)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(300)
    assert not any(t.is_alive() for t in threads), "a request hangs"
    assert not failures, failures
    return counts


def live_tensor_bytes() -> int:
    """Bytes of all storages that tensors of this process are in; of a cache or a weight that was left behind, exactly."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter) and t.device.type == "cpu"]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


class MallocInfo(ctypes.Structure):
    """`struct mallinfo2` of glibc 2.33 and newer: bytes and counts over all arenas."""

    _fields_ = (
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks")),
        *((name, ctypes.c_size_t) for name in ("uordblks", "fordblks", "keepcost")),
    )


def bytes_in_use() -> int | None:
    """What the process has allocated and not freed, outside of Python's own small blocks. None: this C library can't tell.

    Not the resident size: that also counts what is free but kept, which in a process that has run other things before goes
    up and down by tens of MB a round.
    """
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        return None
    mallinfo.restype = MallocInfo
    info = mallinfo()
    return info.uordblks + info.hblkhd


def test_threads_aborts_and_bad_requests(smollm2_dir: Path):
    process = psutil.Process()
    in_use: list[int | None] = []
    blocks: list[int] = []
    threads_before, tensors_before = threading.active_count(), live_tensor_bytes()
    for round_number in range(ROUNDS):
        with cai_runtime.Client(model=str(smollm2_dir), dtype="bf16", kv_cache="24MiB") as client:
            counts = run_round(client, round_number)
            assert sum(counts.values()) == REQUESTS and min(counts.values()) > 0
            engine = client.engine()
            deadline = time.monotonic() + 60
            while (stats := engine.stats()).running + stats.waiting and time.monotonic() < deadline:
                time.sleep(0.05)  # aborted requests leave at the engine's next step
            engine.check_integrity()
            assert stats.pages_used == 0 and stats.running == 0 and stats.waiting == 0
            inside = process.memory_info().rss
        del engine, client
        assert live_tensor_bytes() == tensors_before, "close() did not give all tensors back"
        in_use.append(bytes_in_use())
        blocks.append(sys.getallocatedblocks())
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)  # what the C allocator keeps for later is not the library's
        # The weights alone are 270 MB in bf16.
        assert inside - process.memory_info().rss > 250e6, "close() did not give the weights back"
        assert threading.active_count() <= threads_before + 1, threading.enumerate()  # the watcher of the exit
    # What lies outside of tensors. The first round fills caches; after it some 10 KB and 70 blocks a round were seen. A
    # request that is left behind is more than ten blocks, 2,400 in two rounds.
    assert blocks[-1] - blocks[1] < 1000, f"Python's objects grow from round to round: {blocks}"
    if in_use[-1] is not None and in_use[1] is not None:
        assert in_use[-1] - in_use[1] < 1e6, f"memory in use grows from round to round: {in_use}"
