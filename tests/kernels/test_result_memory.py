"""Memory for large results is used again, and never while a tensor lies over it."""

import gc

import torch

from cai_runtime.kernels.cpu_library import ResultMemory

ROWS, COLUMNS = 5, 1 << 18


def test_memory_is_used_again_once_no_tensor_lies_over_it():
    results = ResultMemory()
    first = results.empty(ROWS, COLUMNS)
    assert first.shape == (ROWS, COLUMNS) and first.dtype == torch.float32 and first.is_contiguous()
    at, row = first.data_ptr(), first[2]
    del first
    gc.collect()
    second = results.empty(ROWS, COLUMNS)
    assert second.data_ptr() != at  # a row of the first is still held
    row.fill_(1.0)
    second.fill_(2.0)
    assert bool((row == 1.0).all())
    del row
    smaller = results.empty(ROWS - 1, COLUMNS)
    assert smaller.data_ptr() == at
    del second, smaller
    larger = results.empty(2 * ROWS, COLUMNS)  # what is too small is let go
    larger.zero_()
    assert not results._free


def test_small_results_are_torchs_own():
    results = ResultMemory()
    small = results.empty(3, 7, torch.int32)
    assert small.shape == (3, 7) and small.dtype == torch.int32
    del small
    assert not results._free


def test_few_results_are_kept():
    results = ResultMemory()
    held = [results.empty(1, COLUMNS) for _ in range(6)]
    held.clear()
    again = results.empty(1, COLUMNS)
    assert len(results._free) < ResultMemory.KEPT
    again.zero_()
