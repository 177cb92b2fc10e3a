"""Triton norms, SwiGLU and RoPE against float64: interpreted on the CPU, or compiled where there is a GPU."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("test_triton_interpreted.py runs these with TRITON_INTERPRET=1", allow_module_level=True)

from cai_runtime.errors import KernelError
from cai_runtime.kernels import triton as backend
from cai_runtime.kernels.attention import HeadNorms

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
DTYPES = list(TOLERANCE)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(dtype).to(DEVICE)


def close(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    assert got.isfinite().all()
    return float((got.double() - wanted).norm() / wanted.norm()) < TOLERANCE[got.dtype]


def expected_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 77), (2, 576), (2, 9000)])  # the last is wider than a block
def test_norms(dtype: torch.dtype, shape: tuple[int, int]):
    torch.manual_seed(0)
    x, residual = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype)
    weight = draw(shape[1]) + 2
    assert close(backend.rms_norm(x, weight, 1e-5), expected_norm(x, weight, 1e-5))
    normed, total = backend.add_rms_norm(x, residual, weight, 1e-5)
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        assert close(total, x.double() + residual.double())  # the interpreter cuts bfloat16 off instead of rounding
    else:
        assert torch.equal(total, x + residual)  # rounded as torch rounds it, and the norm is of that
    assert close(normed, expected_norm(total, weight, 1e-5))


def test_norm_of_strided_rows_and_of_none():
    torch.manual_seed(1)
    x, weight = draw(4, 90), draw(40)
    for rows in (x[:, 7:47], x[::2, :40], draw(40, 3).T):
        assert close(backend.rms_norm(rows, weight, 1e-6), expected_norm(rows, weight, 1e-6))
    assert backend.rms_norm(x[:0, :40], weight, 1e-6).shape == (0, 40)
    normed, total = backend.add_rms_norm(x[:0, :40], x[:0, 40:80], weight, 1e-6)
    assert normed.shape == total.shape == (0, 40)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (3, 66), (2, 3000), (0, 8)])
def test_swiglu(dtype: torch.dtype, shape: tuple[int, int]):
    torch.manual_seed(2)
    x = 3 * draw(*shape, dtype=dtype)
    got = backend.swiglu(x)
    gate, up = x.double().chunk(2, dim=1)
    assert got.shape == gate.shape and got.dtype == dtype
    if shape[0]:
        assert close(got, torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(4, 2, 16, 16), (3, 1, 6, 6), (2, 2, 80, 80), (3, 1, 20, 6), (2, 1, 7, 2)])
@pytest.mark.parametrize("normed", [False, True])
def test_rope_and_kv_write(dtype: torch.dtype, heads: tuple[int, int, int, int], normed: bool):
    torch.manual_seed(3)
    q_heads, kv_heads, dim, rotary = heads
    rows, page_size, width = 5, 4, (q_heads + 2 * kv_heads) * dim
    kept = draw(rows, width + 3, dtype=dtype)
    qkv = kept[:, :width]  # rows lie apart
    before = kept.clone()
    angle = torch.rand(50, rotary // 2) * 6
    cos_sin = torch.cat([angle.cos(), angle.sin()], 1).to(DEVICE)
    positions = torch.tensor([0, 7, 49, 7, 3], dtype=torch.int32, device=DEVICE)
    slots = torch.tensor([11, 2, -1, 0, 7], dtype=torch.int32, device=DEVICE)  # -1: padding
    caches = [torch.full((3, kv_heads, page_size, dim), 9.0, dtype=dtype, device=DEVICE) for _ in range(2)]
    norms = HeadNorms(draw(2, dim, dtype=dtype) + 2, 1e-6) if normed else None
    backend.rope_kv_write(qkv, positions, cos_sin, *caches, slots, q_heads, kv_heads, dim, norms)

    old = before[:, :width].double().view(rows, -1, dim)
    if norms is not None:
        q, k, v = old.split([q_heads, kv_heads, kv_heads], dim=1)
        old = torch.cat([*(expected_norm(x, w, norms.eps) for x, w in zip((q, k), norms.weight, strict=True)), v], 1)
    cos, sin = cos_sin.double()[positions.long()][:, None].chunk(2, dim=-1)
    low, high = old[..., :rotary].chunk(2, dim=-1)
    rotated = torch.cat([low * cos - high * sin, high * cos + low * sin, old[..., rotary:]], -1)
    new = qkv.reshape(rows, -1, dim)
    split = q_heads + kv_heads
    assert close(new[:, :split], rotated[:, :split])
    if not normed:
        assert torch.equal(new[..., rotary:].double(), old[..., rotary:])
    assert torch.equal(new[:, split:].double(), old[:, split:])
    assert torch.equal(kept[:, width:], before[:, width:])
    expected = [torch.full_like(c, 9.0) for c in caches]
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            page, at = divmod(slot, page_size)
            expected[0][page, :, at] = new[row, q_heads:split]
            expected[1][page, :, at] = new[row, split:]
    assert all(torch.equal(c, e) for c, e in zip(caches, expected, strict=True))


def test_bad_arguments_are_named():
    x = draw(2, 8)
    ints = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    cache, table = torch.zeros(1, 1, 4, 2, device=DEVICE), draw(3, 2)
    cases = [
        (lambda: backend.rms_norm(x, draw(7), 1e-5), "weight has shape"),
        (lambda: backend.rms_norm(x.double(), draw(8), 1e-5), "x is torch.float64"),
        (lambda: backend.rms_norm(x, draw(8), -1.0), "eps"),
        (lambda: backend.add_rms_norm(x, x[:1], draw(8), 1e-5), "residual has shape"),
        (lambda: backend.add_rms_norm(x, x.half(), draw(8), 1e-5), "residual is torch.float16"),
        (lambda: backend.swiglu(draw(2, 7)), "even"),
        (lambda: backend.swiglu(draw(7)), "gate_up has shape"),
        (lambda: backend.rope_kv_write(x, ints, table, cache, cache, ints, 3, 1, 2), "qkv has shape"),
        (lambda: backend.rope_kv_write(x, ints.long(), table, cache, cache, ints, 2, 1, 2), "positions is torch.int64"),
        (lambda: backend.rope_kv_write(x, ints, table, cache, cache[:, :, :3], ints, 2, 1, 2), "v_cache has shape"),
        (lambda: backend.rope_kv_write(x, ints, table, cache, cache, ints[:1], 2, 1, 2), "slots has shape"),
        (lambda: backend.rope_kv_write(x, ints, draw(3, 1), cache, cache, ints, 2, 1, 2), "even 2 to D"),
        (lambda: backend.rope_kv_write(x, ints, draw(3, 4), cache, cache, ints, 2, 1, 2), "even 2 to D"),
        (
            lambda: backend.rope_kv_write(x, ints, table, cache, cache, ints, 2, 1, 2, HeadNorms(x, 1.0)),
            "norms has shape",
        ),
    ]
    for call, message in cases:
        with pytest.raises(KernelError, match=message):
            call()
