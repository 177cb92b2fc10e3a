"""`CudaLinear` down to the kernels without a GPU: ops.cu as it is, its launches run by the emulated device."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cuda_emulation import NVCC, ROOT, relative_error, toolkit_headers

from cai_runtime.errors import KernelError
from cai_runtime.kernels import cuda
from cai_runtime.kernels.activation import swiglu_reference
from cai_runtime.kernels.norm import RmsNorm, rms_norm_reference
from cai_runtime.kernels.slim_linear import reference
from cai_runtime.kernels.weights import Core, LinearWeights

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed: its headers are needed")

BF16 = torch.bfloat16


class HostLinear(cuda.CudaLinear):
    """The emulated device has the CPU's memory."""

    device_type = "cpu"


@pytest.fixture(scope="module", autouse=True)
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    import tvm_ffi
    from tvm_ffi import libinfo

    target = tmp_path_factory.mktemp("library") / "libemulated.so"
    command = [*(os.environ.get("CXX") or "c++").split(), "-std=c++17", "-O1", "-shared", "-fPIC", "-Wno-attributes"]
    command += [f"-I{ROOT / 'csrc'}", f"-I{toolkit_headers()}", f"-I{libinfo.find_include_path()}"]
    command += [f"-I{libinfo.find_dlpack_include_path()}", str(ROOT / "tests/kernels/cuda_emulator/library.cpp")]
    command += [f"-L{Path(libinfo.find_libtvm_ffi()).parent}", "-ltvm_ffi", "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = tvm_ffi.load_module(str(target))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "library", lambda: loaded)
        yield


def core(rows: int, cols: int, store: str) -> Core:
    if store == "int8":
        return Core(
            torch.randint(-127, 128, (rows, cols), dtype=torch.int8), (torch.rand(rows) + 0.5) / (60 * cols**0.5)
        )
    if store.startswith("int4"):
        group = int(store.split("/")[1])
        groups = (rows, -(-cols // group))
        scale = ((torch.rand(groups) + 0.5) / (4 * cols**0.5)).bfloat16()
        zero = torch.randint(4, 12, groups, dtype=torch.uint8) if store.endswith("/zero") else None
        return Core(torch.randint(0, 256, (rows, -(-cols // 2)), dtype=torch.uint8), scale, zero, group, cols)
    return Core((torch.randn(rows, cols) / cols**0.5).to({"fp32": torch.float32, "bf16": BF16}[store]))


def linear(kind: str, inp: int, out: int, rank: int, store: str, second: str) -> LinearWeights:
    bias = torch.randn(out)
    if kind == "dense":
        return LinearWeights("dense", inp, out, (core(out, inp, store),), bias=bias)
    rest = out if kind == "lowrank" else out - rank
    pivot = torch.randperm(out).to(torch.int32) if kind == "interpolative" else None
    return LinearWeights(kind, inp, out, (core(rank, inp, store), core(rest, rank, second)), rank, pivot, bias)  # type: ignore[arg-type]


def mixed(inp: int) -> list[LinearWeights]:
    """More members than a launch takes, of every kind, stores mixed, ranks that fit nothing."""
    return [
        linear("interpolative", inp, 60, 32, "int8", "int4/32"), linear("dense", inp, 9, 0, "bf16", ""),
        linear("lowrank", inp, 33, 19, "bf16", "int8"), linear("interpolative", inp, 48, 48, "int8", "bf16"),
        linear("lowrank", inp, 20, 37, "int4/64/zero", "int4/128/zero"),
        linear("interpolative", inp, 41, 16, "int8", "int8"),
        linear("dense", inp, 17, 0, "int8", ""), linear("dense", inp, 5, 0, "int8", ""),
    ]  # fmt: skip


def together(x: torch.Tensor, ws: list[LinearWeights]) -> torch.Tensor:
    return torch.cat([reference(x, w) for w in ws], dim=1)


@pytest.mark.parametrize("rows", [1, 2, 9])
def test_a_mixed_group_plain_normed_and_gated(rows: int):
    torch.manual_seed(rows)
    inp = 150
    ws = mixed(inp)
    prepared = HostLinear(ws)
    x, residual = torch.randn(rows, inp).to(BF16), torch.randn(rows, prepared.out_features).to(BF16)
    assert relative_error(prepared(x), together(x.double(), ws)) < 1e-2
    expected = together(x.double(), ws) + residual.double()
    assert relative_error(prepared(x, residual), expected) < 1e-2
    norm = RmsNorm((torch.rand(inp) + 0.5).to(BF16), 1e-5)
    normed = rms_norm_reference(x.double(), norm.weight.double(), norm.eps)
    assert relative_error(prepared(x, norm=norm), together(normed, ws)) < 1e-2
    gate_up = torch.randn(rows, 2 * inp).to(BF16)
    got = prepared(gate_up, residual, swiglu=True)
    assert relative_error(got, together(swiglu_reference(gate_up.double()), ws) + residual.double()) < 1e-2
    apart = HostLinear(ws, cuda.CudaOptions(fused_swiglu_rows=0))
    assert torch.equal(apart(gate_up, residual, swiglu=True), got)
    assert torch.equal(prepared(gate_up[:1], residual[:1], swiglu=True), got[:1])


@pytest.mark.parametrize("rows", [17, 150])  # divided columns, and whole ones
def test_many_rows_have_the_bits_of_few(rows: int):
    """Of every kind and store, plain, normed and gated, with a residual: rows that come together, and 16 and 1 at a time."""
    torch.manual_seed(rows)
    inp = 150
    ws = mixed(inp)
    prepared = HostLinear(ws)
    x, residual = torch.randn(rows, inp).to(BF16), torch.randn(rows, prepared.out_features).to(BF16)
    gate_up = torch.randn(rows, 2 * inp).to(BF16)
    norm = RmsNorm((torch.rand(inp) + 0.5).to(BF16), 1e-5)
    calls = {
        "plain": lambda part: prepared(x[part]),
        "residual": lambda part: prepared(x[part], residual[part]),
        "norm": lambda part: prepared(x[part], norm=norm),
        "gate": lambda part: prepared(gate_up[part], residual[part], swiglu=True),
    }
    for name, call in calls.items():
        many = call(slice(rows))
        for part in (slice(16), slice(rows - 1, rows)):
            assert torch.equal(call(part), many[part]), name
    assert relative_error(prepared(x), together(x.double(), ws)) < 1e-2


def test_what_it_takes_follows_from_the_16_bit_cores():
    torch.manual_seed(0)
    own, codes = (
        HostLinear([linear("dense", 96, 20, 0, "bf16", "")]),
        HostLinear([linear("dense", 96, 20, 0, "int8", "")]),
    )
    takes = [[p.takes(d) for d in (BF16, torch.float16, torch.float32)] for p in (own, codes)]
    assert takes == [[True, False, False], [True, True, False]]
    with pytest.raises(KernelError, match=r"x is torch.float16; these CUDA linears take torch.bfloat16: use triton"):
        own(torch.randn(2, 96).half())
    with pytest.raises(KernelError, match=r"cores\[0\] is stored as fp32, which has no CUDA kernel"):
        HostLinear([linear("dense", 96, 20, 0, "fp32", "")])


@pytest.mark.parametrize("store", ["int8", "int4/32/zero", "bf16"])
def test_an_interpolative_linear_of_full_rank_has_an_empty_second_core(store: str):
    torch.manual_seed(2)
    w = linear("interpolative", 64, 32, 32, store, store)
    assert w.cores[1].data.numel() == 0
    x = torch.randn(2, 64).to(BF16)
    assert relative_error(HostLinear([w])(x), reference(x.double(), w)) < 1e-2


def test_half():
    torch.manual_seed(1)
    w = linear("interpolative", 64, 48, 20, "int8", "int4/32")
    x = torch.randn(3, 64).half()
    prepared = HostLinear([w])
    assert relative_error(prepared(x), reference(x.double(), w)) < 2e-3
    assert prepared(x[:0]).shape == (0, 48)


def test_rows_that_do_not_fit_together_go_one_part_after_the_other():
    torch.manual_seed(4)
    w = linear("dense", 40_000, 16, 0, "int8", "")
    x = torch.randn(16, 40_000).to(BF16)
    got = HostLinear([w])(x)
    assert relative_error(got, reference(x.double(), w)) < 1e-2
    assert torch.equal(HostLinear([w])(x[:3]), got[:3])


def test_default_options_are_read_at_each_call(monkeypatch: pytest.MonkeyPatch):
    prepared = HostLinear([linear("dense", 32, 16, 0, "bf16", "")])
    x = torch.randn(1, 32).to(BF16)
    prepared(x)
    monkeypatch.setattr(cuda, "default_options", cuda.CudaOptions(dependent_launch=False))
    with pytest.raises(RuntimeError, match="refused by the emulated device"):  # it takes dependent launches alone
        prepared(x)


def test_bad_arguments_are_named():
    w = linear("interpolative", 24, 31, 11, "int8", "int8")
    prepared = HostLinear([w])
    x = torch.randn(2, 24).to(BF16)
    one = RmsNorm(torch.ones(24, dtype=BF16), 1e-5)
    half_bias = LinearWeights("dense", 24, 31, (Core(torch.zeros(31, 24, dtype=BF16)),), bias=torch.zeros(31).half())
    scaled = LinearWeights("dense", 24, 31, (Core(torch.zeros(31, 24, dtype=BF16), torch.ones(31)),))
    cases = [
        (lambda: prepared(x[:, :23]), "x has shape"),
        (lambda: prepared(x.double()), "x is torch.float64"),
        (lambda: prepared(x, x), "residual has shape"),
        (lambda: prepared(x, swiglu=True), "x has shape"),
        (lambda: prepared(x, norm=RmsNorm(one.weight[:23], 1e-5)), "norm.weight has shape"),
        (lambda: prepared(x.repeat(1, 2), norm=one, swiglu=True), "not both"),
        (lambda: HostLinear([half_bias]), r"members\[0\].bias is torch.float16"),
        (lambda: HostLinear([scaled]), r"members\[0\].cores\[0\] is bf16 and has a scale"),
    ]
    for call, message in cases:
        with pytest.raises(KernelError, match=message):
            call()
