"""Factorizes a weight as a matrix product operator (MPO): the reshape, the error of every bond dimension, the cores.

Outputs and inputs are split into sites, out = o_1 o_2 .. and in = i_1 i_2 .. . W becomes a train of cores
[chi_{k-1}, o_k, i_k, chi_k] by successive truncated SVDs (Oseledets, "Tensor-train decomposition", 2011; for neural networks
Novikov, Podoprikhin, Osokin and Vetrov, "Tensorizing neural networks", 2015; for language models Tomut et al.,
"CompactifAI", 2024).

The error metric is made of two Gram matrices (see `decompose`). The root of a general Gram matrix mixes the sites. So each
is replaced by the nearest Kronecker product of one matrix per site (Van Loan and Pitsianis, "Approximation with Kronecker
products", 1993), and the SVDs are taken between the roots of those.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, permutations, product

import torch

from cai_runtime.compressor.factor.decompose import whitened_error
from cai_runtime.slim.spec import ModuleSpec

SITES = 2  # sites of a reshape: with more, errors grow faster than cores shrink
SWEEPS = 8  # sweeps of the Kronecker fit, which converges in about three


@dataclass(frozen=True)
class Reshape:
    """The sites of a weight, row-major: out_dims multiply to out_features, in_dims to in_features."""

    out_dims: tuple[int, ...]
    in_dims: tuple[int, ...]

    @property
    def widest(self) -> int:
        """The smallest bond dimension at which the MPO is exact."""
        return max(self._widths(), default=1)

    def bonds(self, widest: int) -> tuple[int, ...]:
        """The inner bond dimensions, each limited to `widest`."""
        return tuple(min(widest, width) for width in self._widths())

    def parameters(self, widest: int) -> int:
        """Parameters of all cores with bond dimensions limited to `widest`."""
        bonds = (1, *self.bonds(widest), 1)
        return sum(a * o * i * b for (a, b), o, i in zip(pairwise(bonds), self.out_dims, self.in_dims, strict=True))

    def spec(self, widest: int, store: str) -> ModuleSpec:
        return ModuleSpec(
            "mpo",
            math.prod(self.out_dims),
            math.prod(self.in_dims),
            self.bonds(widest),
            (store,) * len(self.out_dims),
            self.out_dims,
            self.in_dims,
        )

    def _widths(self) -> list[int]:
        sites = [o * i for o, i in zip(self.out_dims, self.in_dims, strict=True)]
        return [min(math.prod(sites[:k]), math.prod(sites[k:])) for k in range(1, len(sites))]


def reshapes(out_features: int, in_features: int, sites: int = SITES) -> list[Reshape]:
    """Candidate reshapes: outputs and inputs each split as evenly as possible, in every order of the factors."""
    outs = sorted(set(permutations(_even_factors(out_features, sites))))
    ins = sorted(set(permutations(_even_factors(in_features, sites))))
    return [Reshape(o, i) for o, i in product(outs, ins)]


def _even_factors(n: int, count: int) -> tuple[int, ...]:
    """`count` factors of n, falling, with the smallest possible largest factor."""
    if count == 1:
        return (n,)
    best: tuple[int, ...] = (n,) + (1,) * (count - 1)
    for first in range(1, math.isqrt(n) + 1):
        if n % first == 0:
            found = tuple(sorted((first, *_even_factors(n // first, count - 1)), reverse=True))
            best = min(best, found)
    return best


def kronecker_factors(gram: torch.Tensor, dims: Sequence[int]) -> list[torch.Tensor]:
    """Positive definite matrices, [d, d] fp64 for each of `dims`, whose Kronecker product is nearest to `gram`.

    gram: [n, n], positive definite, n = prod(dims). Alternating least squares over the factors.
    """
    tensor = gram.to(torch.float64).reshape(*dims, *dims)
    count = len(dims)
    eyes = [torch.eye(d, dtype=torch.float64, device=gram.device) for d in dims]
    factors = eyes[:]
    for _ in range(SWEEPS if count > 1 else 1):
        for k in range(count):
            found = tensor
            # From the last site to the first: contracting a site leaves the axis numbers before it unchanged.
            for j in reversed(range(count)):
                if j == k:
                    continue
                sites = found.ndim // 2
                weights = factors[j] / factors[j].square().sum()
                found = torch.tensordot(found, weights, dims=([j, sites + j], [0, 1]))
            factors[k] = found
    return factors


class MpoTrain:
    """A whitened weight in one reshape, ready to be truncated at any bond dimension.

    Errors are measured in the Kronecker metric. They are scaled so that the error of W = 0 equals that in the metric of the
    Gram matrices. Computes in fp64 on the device of `input_gram`.

    weight: [out, in], any float dtype. input_gram: [in, in], the damped mean of x x^T. output_gram: [out, out], the damped
    mean of g g^T; None: the identity.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        input_gram: torch.Tensor,
        output_gram: torch.Tensor | None,
        reshape: Reshape,
    ):
        self.reshape = reshape
        w = weight.to(input_gram.device, torch.float64)
        self._in_roots = [torch.linalg.cholesky(f) for f in kronecker_factors(input_gram, reshape.in_dims)]
        self._out_roots: list[torch.Tensor] | None = None
        scaled = w @ _kronecker(self._in_roots)
        if output_gram is not None:
            self._out_roots = [torch.linalg.cholesky(f) for f in kronecker_factors(output_gram, reshape.out_dims)]
            scaled = _kronecker(self._out_roots).mT @ scaled
        count = len(reshape.out_dims)
        order = [axis for k in range(count) for axis in (k, count + k)]
        self._tensor = scaled.reshape(*reshape.out_dims, *reshape.in_dims).permute(order)
        # Scale: the error of W = 0 is the same in the Kronecker metric and in the metric of the Gram matrices.
        within = float(scaled.square().sum())
        self._unit = whitened_error(w, input_gram, output_gram) / within if within > 0 else 1.0

    def errors(self) -> list[float]:
        """[widest + 1] floats: squared error with bond dimensions limited to 0, 1 .. `widest`. Never rises; ends at 0.

        With two sites the error is exact. With more it is the sum over the bonds, an upper bound (Oseledets 2011, theorem
        2.2).
        """
        tails = torch.zeros(self.reshape.widest + 1, dtype=torch.float64)
        sites = len(self.reshape.out_dims)
        for k in range(1, sites):
            m = self._tensor.reshape(math.prod(self._tensor.shape[: 2 * k]), -1)
            energy = torch.linalg.eigvalsh(m @ m.mT if m.shape[0] <= m.shape[1] else m.mT @ m)
            tail = energy.clamp_min(0).cumsum(0).flip(0).cpu()  # tail[r]: energy beyond the r largest
            tails[: len(tail)] += tail
        tails[-1] = 0
        return (tails.clamp_max(float(self._tensor.square().sum())) * self._unit).tolist()

    def cores(self, widest: int) -> list[torch.Tensor]:
        """The cores, fp32 [chi_{k-1}, o_k, i_k, chi_k], with bond dimensions limited to `widest`.

        Every core but the first has slices of unit norm along its left bond. Per-row 8-bit scales then use the full range.
        """
        out_dims, in_dims = self.reshape.out_dims, self.reshape.in_dims
        bonds = (1, *self.reshape.bonds(widest), 1)
        rest, cores = self._tensor.reshape(1, -1), []
        for k, (o, i) in enumerate(zip(out_dims, in_dims, strict=True)):
            m = rest.reshape(bonds[k] * o * i, -1)
            if k + 1 == len(out_dims):
                core = m
            else:
                u, s, v = torch.linalg.svd(m, full_matrices=False)
                keep = bonds[k + 1]
                core, rest = u[:, :keep], s[:keep, None] * v[:keep]
            cores.append(self._unscaled(core.reshape(bonds[k], o, i, bonds[k + 1]), k))
        for k in range(len(cores) - 1, 0, -1):
            length = cores[k].flatten(1).norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
            cores[k] = cores[k] / length[:, None, None, None]
            cores[k - 1] = cores[k - 1] * length
        return [core.float().contiguous() for core in cores]

    def _unscaled(self, core: torch.Tensor, site: int) -> torch.Tensor:
        """A core with the whitening of its site undone."""
        inverse = torch.linalg.inv(self._in_roots[site])
        core = torch.einsum("aoib,ij->aojb", core, inverse)
        if self._out_roots is None:
            return core
        return torch.einsum("po,aoib->apib", torch.linalg.inv(self._out_roots[site]).mT, core)


def best_train(
    weight: torch.Tensor, input_gram: torch.Tensor, output_gram: torch.Tensor | None, share: float
) -> tuple[Reshape, list[float]]:
    """The reshape with the least error at `share` of the weight's parameters, and its `errors`. Arguments as in
    `MpoTrain`."""

    def judged(reshape: Reshape) -> tuple[float, Reshape, list[float]]:
        errors = MpoTrain(weight, input_gram, output_gram, reshape).errors()
        widest = max(
            (r for r in range(reshape.widest + 1) if reshape.parameters(r) <= share * weight.numel()), default=0
        )
        return errors[widest], reshape, errors

    found = [judged(reshape) for reshape in reshapes(*weight.shape)]
    _, reshape, errors = min(found, key=lambda item: item[0])
    return reshape, errors


def _kronecker(factors: Sequence[torch.Tensor]) -> torch.Tensor:
    whole = factors[0]
    for factor in factors[1:]:
        whole = torch.kron(whole, factor)
    return whole
