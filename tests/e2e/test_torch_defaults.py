"""Chat and the transformers integration under every default dtype and device that a program may have set in torch."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import cai_runtime

DEFAULTS = ["bfloat16", "float16", "float64", "meta"]


@contextlib.contextmanager
def torch_default(name: str) -> Iterator[None]:
    """A default dtype or device of the process, put back afterwards."""
    before = torch.get_default_dtype()
    try:
        if name == "meta":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(getattr(torch, name))
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)


def answer(path: Path) -> str | None:
    with cai_runtime.Client(max_batch=2, kv_cache="8MiB", device="cpu") as client:
        messages = [{"role": "user", "content": "Hello, what is it that you do all day?"}]
        reply = client.chat.completions.create(model=str(path), messages=messages, max_tokens=12, temperature=0)
        return reply.choices[0].message.content


@pytest.fixture(scope="module")
def expected(tiny_dir: Path) -> str | None:
    return answer(tiny_dir)


@pytest.mark.parametrize("name", DEFAULTS)
def test_chat_does_not_see_a_default_of_torch(tiny_dir: Path, expected: str | None, name: str):
    with torch_default(name):
        assert answer(tiny_dir) == expected


def test_a_default_that_another_thread_sets_meanwhile(tiny_dir: Path, expected: str | None):
    """As transformers does: `from_pretrained(dtype=torch.bfloat16)` sets the default of the whole process."""
    set_now, done = threading.Event(), threading.Event()

    def load() -> None:
        with torch_default("bfloat16"):
            set_now.set()
            done.wait(60)

    other = threading.Thread(target=load)
    other.start()
    try:
        assert set_now.wait(60)
        assert torch.get_default_dtype() == torch.bfloat16
        assert answer(tiny_dir) == expected
    finally:
        done.set()
        other.join()
