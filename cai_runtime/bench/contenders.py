"""The contenders in the comparison of linears: our backends, torch and, on a GPU, vLLM's Marlin on the same weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from cai_runtime.bench.factors import Factorization
from cai_runtime.bench.gpu_peers import installed, marlin
from cai_runtime.errors import BenchmarkError, KernelError

if TYPE_CHECKING:
    import torch

    from cai_runtime.kernels.cpu_library import Arena
    from cai_runtime.kernels.weights import Core, LinearWeights

Linear = Callable[["torch.Tensor"], "torch.Tensor"]  # x [M, in] -> y [M, out of all members]
Prepare = Callable[[Sequence["LinearWeights"], "Arena | None"], Linear]
DENSE = Factorization("dense")
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 5e-3}  # relative error, by dtype of the activations


@dataclass(frozen=True)
class Contender:
    """One way to run a group of linears: `engine` and `method`, on weights factorized as `how` and stored in `store`."""

    engine: str
    method: str
    how: Factorization
    store: str
    activations: str  # dtype of x and y
    prepare: Prepare

    @property
    def label(self) -> str:
        return f"{self.engine} {self.method} {self.store}"

    @property
    def tolerance(self) -> float:
        """The largest allowed relative error against the reference."""
        return TOLERANCE[self.activations]


def default_backends(device: str) -> list[str]:
    """Our backends for the device. The reference is not among them, since no engine uses it by default."""
    if not device.startswith("cuda"):
        return ["cpu"]
    from cai_runtime.kernels import cuda

    return ["triton", "cuda"] if cuda.available() else ["triton"]


def check_backends(names: Sequence[str]) -> None:
    """Raise BenchmarkError for an unknown backend."""
    from cai_runtime.kernels.backend import BACKENDS

    for name in names:
        if name not in BACKENDS:
            raise BenchmarkError(f"unknown backend {name!r}; there are: {', '.join(BACKENDS)}")


def linear_contenders(
    backends: Sequence[str], how: Factorization, stores: Sequence[str], device: str, *, peers: bool = True
) -> list[Contender]:
    """All contenders: torch on dense weights and on the factors, in fp32 and bf16 (on a GPU only bf16), then each backend in
    each store.

    peers: include torch, and with int4 also torch's int4 kernel beside our dense int4; on a GPU with vLLM also its
    Marlin beside our dense int8 and int4.
    """
    on_gpu = device.startswith("cuda")
    ours = "bfloat16" if on_gpu else "float32"
    found: list[Contender] = []
    if peers:
        for store, dtype in (("fp32", "float32"), ("bf16", "bfloat16")):
            if on_gpu and store == "fp32":
                continue
            found.append(Contender("torch", "dense", DENSE, store, dtype, torch_dense))
            if how.kind in ("lowrank", "interpolative"):
                found.append(Contender("torch", "two matmuls", how, store, dtype, torch_factors))
        if "int4" in stores:
            found.append(Contender("torch", "tinygemm", DENSE, "int4", "bfloat16", torch_int4))  # its fp32 path is slow
        if on_gpu and installed("vllm"):
            quantized = [store for store in ("int8", "int4") if store in stores]
            found += [Contender("vllm", "marlin", DENSE, store, "bfloat16", marlin) for store in quantized]
    # Dense ones of ours, to compare with those of others.
    theirs = {c.store for c in found if c.method in ("tinygemm", "marlin")} if how.kind != "dense" else set()
    dense = [store for store in stores if store in theirs]
    for backend in backends:
        prepare = partial(our_linear, backend)
        for method, factors, held in [(how.kind, how, stores), ("dense", DENSE, dense)]:
            found += [Contender(backend, method, factors, store, ours, prepare) for store in held]
    return found


def our_linear(backend: str, members: Sequence[LinearWeights], arena: Arena | None) -> Linear:
    from cai_runtime.kernels.prepare import prepare

    return prepare(members, backend=backend, arena=arena)


def placed(x: torch.Tensor, arena: Arena | None) -> torch.Tensor:
    """A copy of x in the arena, in huge pages like our weights; x itself if there is no arena."""
    if arena is None:
        return x
    copy = arena.allocate(max(x.nbytes, 1))[: x.nbytes].view(x.dtype).view(x.shape)
    return copy.copy_(x)


def torch_dense(members: Sequence[LinearWeights], arena: Arena | None) -> Linear:
    """One matrix product, with the members' weights stacked."""
    import torch

    weight = placed(torch.cat([w.cores[0].data for w in members]), arena)
    return lambda x: torch.nn.functional.linear(x, weight)


def torch_factors(members: Sequence[LinearWeights], arena: Arena | None) -> Linear:
    """The factors in torch: one product for all first cores, one for each second core, then the rows in pivot order."""
    import torch

    linear = torch.nn.functional.linear
    first = placed(torch.cat([w.cores[0].data for w in members]), arena)
    seconds = [placed(w.cores[1].data, arena) for w in members]
    ranks = [w.cores[0].shape[0] for w in members]
    if members[0].kind == "lowrank":
        return lambda x: torch.cat(
            [linear(z, second) for z, second in zip(linear(x, first).split(ranks, 1), seconds, strict=True)], dim=1
        )
    # The index of each output in the concatenation z, core_1 z of the first member, z, core_1 z of the second, ...
    sources, offset = [], 0
    for w in members:
        assert w.pivot is not None
        sources.append(torch.argsort(w.pivot.long()) + offset)
        offset += w.out_features
    source = torch.cat(sources)

    def run(x: torch.Tensor) -> torch.Tensor:
        parts = []
        for z, second in zip(linear(x, first).split(ranks, 1), seconds, strict=True):
            parts += [z, linear(z, second)]
        return torch.cat(parts, dim=1).index_select(1, source)

    return run


def torch_int4(members: Sequence[LinearWeights], arena: Arena | None) -> Linear:
    """torch's int4 kernel (tinygemm on a GPU, its counterpart on a CPU) with bf16 activations, the members stacked.

    Raises KernelError if torch has no such kernel or it does not take the shape.
    """
    import torch

    from cai_runtime.slim.int4 import unpack

    cores = [w.cores[0] for w in members]
    group = cores[0].group
    on_gpu = cores[0].data.is_cuda
    pack, multiply = (
        ("_convert_weight_to_int4pack", "_weight_int4pack_mm")
        if on_gpu
        else ("_convert_weight_to_int4pack_for_cpu", "_weight_int4pack_mm_for_cpu")
    )
    if not (hasattr(torch.ops.aten, pack) and hasattr(torch.ops.aten, multiply)):
        raise KernelError(f"torch {torch.__version__} has no int4 kernel for {'CUDA' if on_gpu else 'the CPU'}")
    if cores[0].shape[1] % group:
        raise KernelError(f"torch's int4 kernel takes whole groups of {group} columns, not {cores[0].shape[1]} columns")
    scales = torch.cat([_scales(core) for core in cores])  # [out, groups]
    scales_and_zeros = torch.stack([scales, torch.zeros_like(scales)], dim=-1).transpose(0, 1).contiguous()
    try:
        # On a GPU torch takes the two codes of a byte in the other order; on a CPU it takes one int32 per code.
        codes = torch.cat([core.data for core in cores])
        if on_gpu:
            packed = getattr(torch.ops.aten, pack)(codes << 4 | codes >> 4, 8)
        else:
            packed = getattr(torch.ops.aten, pack)(unpack(codes, cores[0].shape[1]).to(torch.int32), 1)
    except RuntimeError as error:
        raise KernelError(f"torch's int4 kernel: {str(error).splitlines()[0]}") from error
    packed = placed(packed, arena)
    run = getattr(torch.ops.aten, multiply)
    return lambda x: run(x, packed, group, scales_and_zeros)


def _scales(core: Core) -> torch.Tensor:
    assert core.scale is not None
    return core.scale
