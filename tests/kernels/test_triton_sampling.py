"""The Triton sampler chooses the reference's tokens: interpreted on the CPU, or compiled where there is a GPU."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_cases import batches, make_batch

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("test_triton_interpreted.py runs these with TRITON_INTERPRET=1", allow_module_level=True)

from cai_runtime.errors import KernelError
from cai_runtime.kernels.sampling import NEUTRAL, NO_TABLES, SamplingBatch, sample_cpu
from cai_runtime.kernels.sampling_reference import sample_reference
from cai_runtime.kernels.triton import sampling, weigh

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check(logits: np.ndarray, batch: SamplingBatch) -> None:
    wanted = sample_reference(logits, batch)
    found = sampling.TritonSampler(DEVICE)(torch.from_numpy(logits.copy()).to(DEVICE), batch).wait()
    np.testing.assert_array_equal(found.status, wanted.status)
    np.testing.assert_array_equal(found.ids, wanted.ids)
    cpu = sample_cpu(logits.copy(), batch)
    np.testing.assert_array_equal(found.logprobs, cpu.logprobs)
    for mine, theirs in zip(found.top or (), cpu.top or (), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    for mine, theirs in zip((found.logprobs, *(found.top or ())), (wanted.logprobs, *(wanted.top or ())), strict=True):
        assert (mine is None) == (theirs is None)
        if theirs is not None:
            np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1e-6)


@given(batches(st.one_of(st.integers(1, 100), st.just(1000)), max_rows=2))
@settings(max_examples=12, deadline=None)
def test_the_references_tokens(case: tuple):
    check(*case)


def test_rows_of_several_blocks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(weigh, "BLOCK", 128)
    for seed in range(2):
        check(*make_batch(np.random.default_rng(seed), 3, 333))


def test_rows_with_processors_are_the_hosts():
    def only_seven(logits: np.ndarray) -> None:
        logits[:7] = logits[8:] = -np.inf

    logits, batch = make_batch(np.random.default_rng(1), 3, 50)
    batch.mask, batch.custom = None, {1: only_seven}
    logits[1], batch.rows["bias"][1], batch.rows["biases"][1] = 0, 0, 0
    batch.tables = [batch.tables[0], NO_TABLES, batch.tables[2]]
    NO_TABLES.write(batch.rows[1:2])
    check(logits, batch)
    for wanted in ([2, 3, -1], [-1, 3, -1]):
        batch.logprobs = np.array(wanted, np.int8)
        check(logits, batch)


def test_refusals():
    with pytest.raises(KernelError, match="logits of shape"):
        sampling.TritonSampler(DEVICE)(torch.zeros(2, 8, device=DEVICE), SamplingBatch(NEUTRAL.copy(), [NO_TABLES]))
    good = sampling.DeviceBatch.of(SamplingBatch(NEUTRAL.copy(), [NO_TABLES]), DEVICE)
    scratch = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    with pytest.raises(KernelError, match="weights has 4 elements"):
        status = torch.zeros(1, dtype=torch.uint8, device=DEVICE)
        sampling.launch_sample(torch.zeros(1, 8, device=DEVICE), good, scratch, scratch[:1], status)
