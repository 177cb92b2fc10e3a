"""RMSNorm, SwiGLU and the embedding: the CPU kernels against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cai_runtime.errors import KernelError
from cai_runtime.kernels import cpu_library
from cai_runtime.kernels.activation import swiglu_cpu, swiglu_reference
from cai_runtime.kernels.embedding import CpuEmbedding, embedding_reference
from cai_runtime.kernels.norm import add_rms_norm_cpu, add_rms_norm_reference, rms_norm_cpu, rms_norm_reference
from cai_runtime.kernels.slim_linear import CpuLinear, as_dense
from cai_runtime.kernels.weights import Core


@pytest.fixture(params=cpu_library.instruction_sets())
def isa(request: pytest.FixtureRequest):
    best = cpu_library.instruction_set()
    cpu_library.use_instruction_set(request.param)
    yield request.param
    cpu_library.use_instruction_set(best)


@pytest.mark.parametrize("rows", [0, 1, 3, 300])
@pytest.mark.parametrize("width", [1, 7, 16, 100, 576])
def test_rms_norm(isa: str, rows: int, width: int):
    g = torch.Generator().manual_seed(width)
    x, residual = torch.randn(rows, width, generator=g) * 3, torch.randn(rows, width, generator=g)
    weight = torch.randn(width, generator=g)
    expected = rms_norm_reference(x.double(), weight.double(), 1e-5)
    torch.testing.assert_close(rms_norm_cpu(x, weight, 1e-5).double(), expected, rtol=2e-6, atol=2e-6)
    normed, total = add_rms_norm_cpu(x, residual, weight, 1e-5)
    expected, expected_total = add_rms_norm_reference(x.double(), residual.double(), weight.double(), 1e-5)
    torch.testing.assert_close(normed.double(), expected, rtol=2e-6, atol=2e-6)
    assert torch.equal(total, expected_total.float())


@given(st.integers(0, 40), st.integers(1, 130), st.sampled_from([0.1, 5.0, 200.0]))
@settings(max_examples=40, deadline=None)
def test_swiglu(rows: int, width: int, spread: float):
    g = torch.Generator().manual_seed(rows * 131 + width)
    x = torch.randn(rows, 2 * width, generator=g) * spread
    torch.testing.assert_close(swiglu_cpu(x).double(), swiglu_reference(x.double()), rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_embedding_looks_up_exactly(isa: str, dtype: torch.dtype):
    g = torch.Generator().manual_seed(2)
    values = torch.randn(50, 37, generator=g)
    table = Core(values.to(dtype))
    if dtype == torch.int8:
        table = Core((values * 40).round().clamp(-127, 127).to(torch.int8), torch.rand(50, generator=g) + 0.1)
    lookup = CpuEmbedding(CpuLinear([as_dense(table)]))
    ids = torch.tensor([0, 49, 3, 3, 17, 48], dtype=torch.int32)
    assert torch.equal(lookup(ids), embedding_reference(table, ids, torch.float32))
    for bad in (-1, 50):
        with pytest.raises(KernelError, match=str(bad)):
            lookup(torch.tensor([bad]))
