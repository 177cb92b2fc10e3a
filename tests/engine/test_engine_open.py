"""What opening a checkpoint does besides loading it."""

import logging

import pytest
import torch

from cai_runtime.byte_sizes import format_bytes, parse_bytes
from cai_runtime.engine.model_runner import ModelRunner
from cai_runtime.engine.open import PAGE_SIZE, load_runner, prefill_chunk
from cai_runtime.errors import KernelError, MemoryBudgetError
from cai_runtime.kernels.attention import CpuKVCache, HeadLayout, ReferenceKVCache
from cai_runtime.options import EngineOptions
from tests.engine.test_cuda_graphs import checkpoint  # noqa: F401 - a fixture


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [16, 24, 64])
def test_a_cache_says_how_large_its_pages_are(dtype, head_dim):
    heads = HeadLayout(4, 2, head_dim, rotary_dim=head_dim)
    made = ReferenceKVCache(64, 16, heads, dtype, torch.device("cpu"))
    assert made.k.nbytes + made.v.nbytes == 64 * ReferenceKVCache.page_bytes(16, heads, dtype)
    made = CpuKVCache(64, 16, heads, dtype)  # in whole pages of the system
    assert made.k.nbytes + made.v.nbytes == 64 * CpuKVCache.page_bytes(16, heads, dtype)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_budget_in_bytes_gives_that_many_pages(checkpoint, backend, monkeypatch, caplog):  # noqa: F811
    calls = []
    monkeypatch.setattr(ModelRunner, "record_graphs", lambda self, progress=None: calls.append(self))
    with caplog.at_level(logging.INFO, logger="cai_runtime.engine"):
        runner, _ = load_runner(checkpoint, device="cpu", backend=backend, kv_cache="64KiB", max_context=8)
    assert runner.num_pages == (64 << 10) // runner.groups[0].page_bytes
    assert (runner.max_context, runner.model_context) == (8, runner._model.max_context)
    assert calls == [runner], "graphs are recorded before the first request"
    assert "loaded" in caplog.text and f"{runner.num_pages * PAGE_SIZE} positions" in caplog.text
    runner.close()


def test_a_context_beyond_the_models_is_refused_before_the_weights_are_loaded(checkpoint, monkeypatch):  # noqa: F811
    monkeypatch.setattr("cai_runtime.models.registry.build_model", lambda *_: pytest.fail("the weights are loaded"))
    with pytest.raises(MemoryBudgetError, match="give at most"):
        load_runner(checkpoint, device="cpu", max_context=1 << 20)


def test_a_runner_whose_graphs_cannot_be_recorded_is_closed(checkpoint, monkeypatch):  # noqa: F811
    closed = []

    def refuse(self, progress=None):
        raise KernelError("can't be recorded")

    monkeypatch.setattr(ModelRunner, "record_graphs", refuse)
    monkeypatch.setattr(ModelRunner, "close", lambda self: closed.append(self))
    with pytest.raises(KernelError, match="recorded"):
        load_runner(checkpoint, device="cpu", kv_cache="64KiB")
    assert len(closed) == 1


@pytest.mark.parametrize(
    ("count", "text"), [(1, "1B"), (1023, "1023B"), (1024, "1KiB"), (32 << 20, "32MiB"), (3 << 29, "1.5GiB")]
)
def test_bytes_are_written_as_they_are_read(count, text):
    assert format_bytes(count) == text and parse_bytes(text) == count
    assert format_bytes(count, at_least=True) == text
    assert parse_bytes(format_bytes(count + 1, at_least=True)) >= count + 1


def test_chunks_of_prompts_suit_the_device():
    cpu, gpu = torch.device("cpu"), torch.device("cuda:1")
    assert [prefill_chunk(EngineOptions(), place) for place in (cpu, gpu)] == [512, 4096]
    assert [prefill_chunk(EngineOptions(prefill_chunk=7), place) for place in (cpu, gpu)] == [7, 7]
