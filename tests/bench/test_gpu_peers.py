"""Other libraries' GPU kernels. Stand-ins on the CPU take the arguments and layouts that their documentation names."""

import sys
import types

import pytest
import torch

from cai_runtime.bench import attention, contenders, gpu_peers
from cai_runtime.bench.attention import AttentionSettings, attention_contenders
from cai_runtime.bench.attention_cases import PAGE_SIZE, Case
from cai_runtime.bench.contenders import linear_contenders
from cai_runtime.bench.cuda_graph import count_kernels
from cai_runtime.bench.factors import Factorization, RandomWeights
from cai_runtime.bench.gpu_peers import flashinfer_calls, marlin, packed_columns
from cai_runtime.bench.linear import LinearSettings
from cai_runtime.errors import KernelError
from cai_runtime.kernels.slim_linear import reference
from cai_runtime.models.shapes import AttentionHeads

HEADS = AttentionHeads(8, 2, 16)


class Paged:
    """Attention over pages [pages, 2, page, heads, dim] ("NHD"), as FlashInfer's wrappers describe it."""

    def __init__(self, workspace, kv_layout="NHD", use_tensor_cores=False):
        assert workspace.dtype == torch.uint8 and not workspace.any() and kv_layout == "NHD"
        self.by_matrix_units = use_tensor_cores

    def _plan(self, starts, paged, sizes, window_left, sm_scale, q_data_type, kv_data_type):
        assert q_data_type == kv_data_type
        self.starts, (self.indptr, self.indices, self.last) = starts.tolist(), (t.tolist() for t in paged)
        self.query_heads, self.kv_heads, self.dim, self.page = sizes
        self.window_left, self.scale = window_left, sm_scale

    def run(self, q, cache):
        assert q.shape[1:] == (self.query_heads, self.dim)
        assert cache.shape[1:] == (2, self.page, self.kv_heads, self.dim)
        out = torch.empty_like(q)
        for s, (begin, end) in enumerate(zip(self.starts, self.starts[1:], strict=False)):
            pages = cache[self.indices[self.indptr[s] : self.indptr[s + 1]]]
            length = (len(pages) - 1) * self.page + self.last[s]
            k, v = (pages[:, part].flatten(0, 1)[:length].double() for part in (0, 1))
            group = self.query_heads // self.kv_heads
            for row in range(begin, end):
                last = length - (end - row)
                first = 0 if self.window_left < 0 else max(0, last - self.window_left)
                query = q[row].double().view(self.kv_heads, group, self.dim)
                scores = torch.einsum("hgd,thd->hgt", query, k[first : last + 1]) * self.scale
                out[row] = (
                    torch.einsum("hgt,thd->hgd", scores.softmax(-1), v[first : last + 1]).flatten(0, 1).to(q.dtype)
                )
        return out


class Decode(Paged):
    def plan(self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, **options):
        starts = torch.arange(len(indptr))
        self._plan(
            starts, (indptr, indices, last_page_len), (num_qo_heads, num_kv_heads, head_dim, page_size), **options
        )


class Prefill(Paged):
    def plan(
        self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads,
        head_dim_qk, page_size, *, causal, **options,
    ):  # fmt: skip
        assert causal
        paged = (paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        self._plan(qo_indptr, paged, (num_qo_heads, num_kv_heads, head_dim_qk, page_size), **options)


@pytest.fixture
def flashinfer(monkeypatch):
    module = types.ModuleType("flashinfer")
    module.BatchDecodeWithPagedKVCacheWrapper = Decode
    module.BatchPrefillWithPagedKVCacheWrapper = Prefill
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr(gpu_peers, "WORKSPACE_BYTES", 16)
    return module


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("case", [("decode", 37, 3), ("decode", 2 * PAGE_SIZE, 1), ("prefill", 21, 1)])
def test_flashinfer_gets_pages_that_hold_the_same_keys(flashinfer, case, window):
    case = Case(case[0], HEADS, case[1], case[2], window)
    calls = flashinfer_calls(case, 2, "cpu", "float16")
    rows, expected = case.expected("cpu", "float16", "float16")
    for call in calls:
        torch.testing.assert_close(call()[rows].double(), expected, atol=2e-3, rtol=2e-3)


def test_what_flashinfer_raises_is_its_reason(flashinfer):
    flashinfer.BatchDecodeWithPagedKVCacheWrapper.plan = None
    case = Case("decode", HEADS, 5, 1, None)
    with pytest.raises(KernelError, match="FlashInfer: TypeError: 'NoneType' object is not callable"):
        flashinfer_calls(case, 1, "cpu", "float16")


def test_flashinfer_runs_where_it_is_installed_on_a_gpu(monkeypatch):
    monkeypatch.setattr(attention, "installed", lambda name: name == "flashinfer")

    def engines(**changes):
        settings = AttentionSettings(HEADS, backends=("triton",), caches=("fp32", "bf16", "int8"), **changes)
        return [(c.engine, c.cache) for c in attention_contenders(settings)]

    ours = [("triton", "fp32"), ("triton", "bf16"), ("triton", "int8")]
    assert engines(device="cuda:0") == [("torch", "fp32"), ("torch", "bf16"), ("flashinfer", "bf16"), *ours]
    assert engines(device="cpu") == [("torch", "fp32"), ("torch", "bf16"), *ours]
    assert engines(device="cuda:0", peers=False) == ours


def stand_in_for_vllm(monkeypatch, gemm):
    """Packages of vLLM's names. Repacked weights and permuted scales stay as they are, which the product knows."""
    utils = "vllm.model_executor.layers.quantization.utils.marlin_utils"
    names = [utils.rsplit(".", depth)[0] for depth in range(5, 0, -1)]
    modules = {name: types.ModuleType(name) for name in (*names, utils, "vllm._custom_ops", "vllm.scalar_type")}
    ops = modules["vllm"]._custom_ops = modules["vllm._custom_ops"]
    modules[utils].marlin_make_workspace_new = lambda device: torch.zeros(1, dtype=torch.int32, device=device)
    modules[utils].marlin_permute_scales = lambda s, size_k, size_n, group_size: s
    modules["vllm.scalar_type"].scalar_types = types.SimpleNamespace(uint4b8=(4, 8), uint8b128=(8, 128))
    ops.gptq_marlin_repack = lambda b_q_weight, size_k, size_n, num_bits, is_a_8bit=False: b_q_weight
    ops.marlin_gemm = gemm
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


def gptq_product(a, c, b_q_weight, b_scales, workspace, b_q_type, size_m, size_n, size_k, use_fp32_reduce=False):
    bits, zero = b_q_type
    shifts = torch.arange(0, 32, bits)
    codes = (b_q_weight[:, None, :] >> shifts[None, :, None]) & (2**bits - 1)
    codes = codes.reshape(size_k, size_n)
    assert a.shape == (size_m, size_k) and b_scales.shape[1] == size_n and c is None and use_fp32_reduce
    scales = b_scales.float().repeat_interleave(size_k // b_scales.shape[0], 0)
    return (a.float() @ ((codes - zero) * scales)).to(a.dtype)


@pytest.mark.parametrize("store", ["int4", "int8"])
def test_marlin_gets_the_codes_as_gptq_packs_them(monkeypatch, store):
    stand_in_for_vllm(monkeypatch, gptq_product)
    members = RandomWeights("cpu", 64).group_of(256, (64, 128), Factorization("dense"), store)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = torch.cat([reference(x.double(), w) for w in members], dim=1)
    error = (marlin(members, None)(x).double() - expected).norm() / expected.norm()
    assert error < 1e-2


def test_a_marlin_of_another_interface_is_refused_by_its_arguments(monkeypatch):
    def gemm(a, b_q_weight, b_scales, secret, size_m, size_n, size_k):
        raise AssertionError

    stand_in_for_vllm(monkeypatch, gemm)
    members = RandomWeights("cpu", 64).group_of(256, (64,), Factorization("dense"), "int4")
    run = marlin(members, None)
    with pytest.raises(KernelError, match="gemm of this version needs secret, which is unknown here"):
        run(torch.zeros(1, 256, dtype=torch.bfloat16))
    small = RandomWeights("cpu", 64).group_of(64, (32,), Factorization("dense"), "int4")
    with pytest.raises(KernelError, match="multiples of 128 columns and 64 rows, not 32 rows of 64"):
        marlin(small, None)


def test_a_vllm_that_can_t_be_imported_is_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    members = RandomWeights("cpu", 64).group_of(256, (64,), Factorization("dense"), "int4")
    with pytest.raises(KernelError, match=r"vLLM: ModuleNotFoundError: .*vllm"):
        marlin(members, None)


def test_marlin_runs_where_vllm_is_installed_beside_dense_ones_of_ours(monkeypatch):
    monkeypatch.setattr(contenders, "installed", lambda name: name == "vllm")
    half = Factorization("interpolative", 0.5)

    def labels(device, **changes):
        return {c.label for c in linear_contenders(["triton"], half, ("bf16", "int8", "int4"), device, **changes)}

    of_marlin = {"vllm marlin int8", "vllm marlin int4"}
    assert labels("cuda:0") >= of_marlin | {"triton dense int8", "triton dense int4"}
    assert not labels("cpu") & (of_marlin | {"triton dense int8"})
    assert not labels("cuda:0", peers=False) & (of_marlin | {"triton dense int8", "triton dense int4"})


def test_words_have_the_first_row_in_their_lowest_bits():
    codes = torch.tensor([[1], [2], [3], [4], [5], [6], [7], [15]], dtype=torch.int32)
    assert packed_columns(codes, 4).tolist() == [[0xF7654321 - (1 << 32)]]
    assert packed_columns(codes, 8).tolist() == [[0x04030201], [0x0F070605]]


class Driver:
    """libcuda with one graph: the kinds of its nodes."""

    def __init__(self, kinds, fails=""):
        self.kinds, self.fails = kinds, fails

    def cuGraphGetNodes(self, graph, nodes, count):
        assert graph.value == 77
        if nodes is None:
            count._obj.value = len(self.kinds)
        else:
            nodes[:] = [100 + i for i in range(len(self.kinds))]
        return int(self.fails == "nodes")

    def cuGraphNodeGetType(self, node, kind):
        kind._obj.value = self.kinds[node.value - 100]
        return int(self.fails == "types")


def test_kernels_of_a_graph_are_counted_without_copies():
    graph = types.SimpleNamespace(raw_cuda_graph=lambda: 77)
    assert count_kernels(graph, Driver([0, 1, 0, 2, 0])) == 3
    assert count_kernels(graph, Driver([])) == 0
    assert count_kernels(graph, Driver([0], fails="nodes")) is None
    assert count_kernels(graph, Driver([0], fails="types")) is None


def test_rows_by_default_are_those_of_the_device():
    assert LinearSettings(device="cpu").rows == (1, 4, 16, 512)
    assert LinearSettings(device="cuda:0").rows == (1, 16, 64, 512, 4096)
    assert LinearSettings(device="cuda:0", batches=(3,)).rows == (3,)
