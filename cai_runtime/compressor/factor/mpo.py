"""One weight into a matrix product operator: the reshape, the errors of every bond dimension, and the cores.

Outputs and inputs are split into sites, out = o_1 o_2 .. and in = i_1 i_2 .., and W becomes a train of cores
[chi_{k-1}, o_k, i_k, chi_k] by one truncated SVD after another (Oseledets, "Tensor-train decomposition", 2011; for layers of
neural networks Novikov, Podoprikhin, Osokin and Vetrov, "Tensorizing neural networks", 2015; for language models Tomut et
al., "CompactifAI", 2024).

Which errors count is a Gram matrix of the inputs and one of the outputs' loss gradients (see `decompose`), and a general one
would destroy the sites. The nearest Kronecker product of matrices, one for each site, does not (Van Loan and Pitsianis,
"Approximation with Kronecker products", 1993): each SVD is taken between roots of those.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, permutations, product

import torch

from cai_runtime.compressor.factor.decompose import whitened_error
from cai_runtime.slim.spec import ModuleSpec

SITES = 2  # of a reshape: with more the errors grow faster than the cores shrink
SWEEPS = 8  # of the fit of a Kronecker product, which is as good as converged after three


@dataclass(frozen=True)
class Reshape:
    """The sites of a weight: out_dims multiply to its outputs, in_dims to its inputs, row-major."""

    out_dims: tuple[int, ...]
    in_dims: tuple[int, ...]

    @property
    def widest(self) -> int:
        """The bond dimension from which on nothing is cut off anywhere."""
        return max(self._widths(), default=1)

    def bonds(self, widest: int) -> tuple[int, ...]:
        """The inner bond dimensions where none may exceed `widest`."""
        return tuple(min(widest, width) for width in self._widths())

    def parameters(self, widest: int) -> int:
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
    """The reshapes worth trying: outputs and inputs each in factors as near to each other as can be, in every order."""
    outs = sorted(set(permutations(_even_factors(out_features, sites))))
    ins = sorted(set(permutations(_even_factors(in_features, sites))))
    return [Reshape(o, i) for o, i in product(outs, ins)]


def _even_factors(n: int, count: int) -> tuple[int, ...]:
    """`count` factors of n, the largest of which is as small as can be."""
    if count == 1:
        return (n,)
    best: tuple[int, ...] = (n,) + (1,) * (count - 1)
    for first in range(1, math.isqrt(n) + 1):
        if n % first == 0:
            found = tuple(sorted((first, *_even_factors(n // first, count - 1)), reverse=True))
            best = min(best, found)
    return best


def kronecker_factors(gram: torch.Tensor, dims: Sequence[int]) -> list[torch.Tensor]:
    """Positive definite matrices, [d, d] fp64 for each of `dims`, whose Kronecker product comes closest to `gram` [n, n],
    n = prod(dims), which is so itself. Alternating least squares, one factor after another."""
    tensor = gram.to(torch.float64).reshape(*dims, *dims)
    count = len(dims)
    eyes = [torch.eye(d, dtype=torch.float64, device=gram.device) for d in dims]
    factors = eyes[:]
    for _ in range(SWEEPS if count > 1 else 1):
        for k in range(count):
            found = tensor
            # From the last site to the first, so that the axes before it keep their numbers.
            for j in reversed(range(count)):
                if j == k:
                    continue
                sites = found.ndim // 2
                weights = factors[j] / factors[j].square().sum()
                found = torch.tensordot(found, weights, dims=([j, sites + j], [0, 1]))
            factors[k] = found
    return factors


class MpoTrain:
    """A weight between the roots of its metric, in one reshape.

    Errors are those of the Kronecker products' metric, scaled to that of the Gram matrices where the whole weight is lost.

    weight: [out, in]. input_gram: [in, in], the damped mean of x x^T; output_gram: [out, out], that of the loss gradients
    at the outputs, None: the identity. Computes in fp64 on the device of `input_gram`.
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
        # The Kronecker product is not the metric itself: scaled so that the whole weight counts alike in both.
        within = float(scaled.square().sum())
        self._unit = whitened_error(w, input_gram, output_gram) / within if within > 0 else 1.0

    def errors(self) -> list[float]:
        """[widest + 1] floats: squared error in the metric where no bond exceeds 0, 1 .. `widest`. Between two sites it is
        the least there is; with more the sum over the bonds, which the SVDs one after another do not exceed (Oseledets
        2011, theorem 2.2). Never rises; ends at 0."""
        tails = torch.zeros(self.reshape.widest + 1, dtype=torch.float64)
        sites = len(self.reshape.out_dims)
        for k in range(1, sites):
            m = self._tensor.reshape(math.prod(self._tensor.shape[: 2 * k]), -1)
            energy = torch.linalg.eigvalsh(m @ m.mT if m.shape[0] <= m.shape[1] else m.mT @ m)
            tail = energy.clamp_min(0).cumsum(0).flip(0).cpu()  # of the smallest 1 .. all, the largest first
            tails[: len(tail)] += tail
        tails[-1] = 0
        return (tails.clamp_max(float(self._tensor.square().sum())) * self._unit).tolist()

    def cores(self, widest: int) -> list[torch.Tensor]:
        """fp32 [chi_{k-1}, o_k, i_k, chi_k] where no bond exceeds `widest`. The slices of every core but the first at its
        left bond have length one: a row's 8-bit scale then wastes no code on strong ones."""
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
        """A core without the roots that the SVDs were taken between."""
        inverse = torch.linalg.inv(self._in_roots[site])
        core = torch.einsum("aoib,ij->aojb", core, inverse)
        if self._out_roots is None:
            return core
        return torch.einsum("po,aoib->apib", torch.linalg.inv(self._out_roots[site]).mT, core)


def best_train(
    weight: torch.Tensor, input_gram: torch.Tensor, output_gram: torch.Tensor | None, share: float
) -> tuple[Reshape, list[float]]:
    """The reshape with the least error among those of `share` of the weight's parameters, and its `errors`."""

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
