"""Whitened SVD of one weight: the best factors of every rank at once, and their interpolative form.

The error of an approximation V is the error of the outputs on real inputs, weighted by the effect on the loss:

    ||L^T (W - V) S||_F^2,   S S^T = G = mean x x^T (inputs),   L L^T = F = mean g g^T (loss gradients at the output).

With F = I this is SVD-LLM (Wang et al., "SVD-LLM: Truncation-aware singular value decomposition for large language model
compression", 2024). With F it is a Kronecker-factored second-order estimate of the loss (Martens and Grosse, "Optimizing
neural networks with Kronecker-factored approximate curvature", 2015). By the Eckart-Young theorem, the truncated SVD of
L^T W S is optimal at each rank, and its error is the sum of the truncated squared singular values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Shares of the mean diagonal added to the diagonal: directions absent from the calibration text still count.
INPUT_DAMPING = 1e-2
OUTPUT_DAMPING = 1e-1
SWAP_BOUND = 1.2  # bound on the entries of an interpolative core_1, see `interpolate`


@dataclass(frozen=True)
class Factors:
    """W = left @ right, n = min(out, in); the first r columns and rows are the best approximation of rank r.

    left: [out, n], fp32; right: [n, in], fp32. energy: [n], fp64, squared singular values of the whitened weight,
    descending; the whitened squared error at rank r is `energy[r:].sum()`.
    """

    left: torch.Tensor
    right: torch.Tensor
    energy: torch.Tensor

    def to(self, device: torch.device | str) -> Factors:
        """The factors on another device."""
        return Factors(self.left.to(device), self.right.to(device), self.energy.to(device))

    def errors(self) -> list[float]:
        """[n + 1] floats: whitened squared error of the best approximation of rank 0, 1 .. n. Never rises; ends at
        0."""
        return [*self.energy.flip(0).cumsum(0).flip(0).tolist(), 0.0]

    def relative_errors(self) -> list[float]:
        """`errors` over the first of them; zeros for a weight of zeros."""
        errors = self.errors()
        return [error / errors[0] if errors[0] > 0 else 0.0 for error in errors]


def damped(gram: torch.Tensor, damping: float = INPUT_DAMPING) -> torch.Tensor:
    """gram + damping * mean(diagonal) * I as a new fp64 tensor. A Gram matrix of zeros (no inputs) becomes the identity."""
    gram = gram.to(torch.float64, copy=True)
    mean = float(gram.diagonal().mean())
    gram.diagonal().add_(damping * mean if mean > 0 else 1.0)
    return gram


def factorize(weight: torch.Tensor, input_gram: torch.Tensor, output_gram: torch.Tensor | None = None) -> Factors:
    """The whitened SVD of W [out, in] in fp64, on the device of `input_gram`.

    input_gram: [in, in], the damped mean of x x^T. output_gram: [out, out], the damped mean of g g^T; None: the
    identity.
    """
    w = weight.to(input_gram.device, torch.float64)
    root_in = torch.linalg.cholesky(input_gram)
    root_out = torch.linalg.cholesky(output_gram) if output_gram is not None else None
    scaled = root_out.mT @ w if root_out is not None else w
    m = scaled @ root_in
    # The eigendecomposition of the smaller of m m^T and m^T m is several times faster than an SVD of m. It loses singular
    # values below 1e-8 of the largest, which do not affect the error.
    if m.shape[0] <= m.shape[1]:
        energy, u = torch.linalg.eigh(m @ m.mT)
        u = u.flip(1)
        left = torch.linalg.solve_triangular(root_out.mT, u, upper=True) if root_out is not None else u
        right = u.mT @ scaled  # = (U^T m) S^-1
    else:
        energy, v = torch.linalg.eigh(m.mT @ m)
        v = v.flip(1)
        left = w @ (root_in @ v)  # = L^-T (m V)
        right = torch.linalg.solve_triangular(root_in.mT, v, upper=True).mT
    # Columns of unit norm: per-row scales of an 8-bit core_1 then use the full range.
    length = left.norm(dim=0).clamp_min(torch.finfo(torch.float64).tiny)
    return Factors((left / length).float(), (right * length[:, None]).float(), energy.flip(0).clamp_min(0))


def spectrum(weight: torch.Tensor, input_gram: torch.Tensor, output_gram: torch.Tensor | None = None) -> torch.Tensor:
    """`Factors.energy` alone, [min(out, in)], fp64 on the CPU. Arguments as in `factorize`."""
    w = weight.to(input_gram.device, torch.float64)
    if output_gram is not None:
        w = torch.linalg.cholesky(output_gram).mT @ w
    m = w @ torch.linalg.cholesky(input_gram)
    square = m @ m.mT if m.shape[0] <= m.shape[1] else m.mT @ m
    return torch.linalg.eigvalsh(square).flip(0).clamp_min(0).cpu()


def whitened_error(error: torch.Tensor, input_gram: torch.Tensor, output_gram: torch.Tensor | None = None) -> float:
    """||L^T E S||_F^2 of an error E [out, in] of the weight. Gram matrices as in `factorize`."""
    e = error.to(input_gram.device, torch.float64)
    outer = e if output_gram is None else output_gram @ e
    return float(((e @ input_gram) * outer).sum())


@dataclass(frozen=True)
class Interpolative:
    """core_0 [r, in] and core_1 [out - r, r], fp32; pivot [out], int64. With z = core_0 x: y[pivot[:r]] = z and
    y[pivot[r:]] = core_1 z."""

    core_0: torch.Tensor
    core_1: torch.Tensor
    pivot: torch.Tensor


def interpolate(left: torch.Tensor, right: torch.Tensor, *, bound: float = SWAP_BOUND) -> Interpolative:
    """The product left @ right in interpolative form: r (in + out - r) parameters instead of r (in + out), without loss.

    All rows of a rank-r matrix are combinations of any r independent rows (Cheng, Gimbutas, Martinsson and Rokhlin, "On the
    compression of low rank matrices", 2005). The choice of rows matters for rounding: large coefficients in core_1 amplify
    the rounding errors of core_0. LU pivots are the start; rows are swapped until no coefficient exceeds `bound` (Goreinov,
    Oseledets, Savostyanov, Tyrtyshnikov and Zamarashkin, "How to find a good submatrix", 2010). The swaps terminate, because
    each multiplies the volume of the pivot rows by more than `bound`.

    left: [out, r]. right: [r, in]. r < out. Any float dtype. bound: largest magnitude of an entry of core_1.
    """
    out, rank = left.shape
    left = left.to(torch.float64)
    lu, swaps, info = torch.linalg.lu_factor_ex(left)
    if int(info) != 0:  # LU failed on dependent columns: take an orthonormal basis
        left, triangle = torch.linalg.qr(left)
        right = triangle @ right.to(torch.float64)
        lu, swaps, _ = torch.linalg.lu_factor_ex(left)
    pivot = _permutation(swaps, out)
    lower, rest = lu[:rank], lu[rank:]
    coefficients = torch.linalg.solve_triangular(lower, rest, upper=False, left=False, unitriangular=True)
    if _swap_large(coefficients, pivot, bound):
        chosen = left[pivot[:rank]]  # solve again, since the updates accumulate rounding errors
        coefficients = torch.linalg.solve(chosen, left[pivot[rank:]], left=False)
    core_0 = left[pivot[:rank]] @ right.to(torch.float64)
    return Interpolative(core_0.float(), coefficients.float(), pivot)


def _permutation(swaps: torch.Tensor, size: int) -> torch.Tensor:
    """LAPACK's row interchanges (1-based, in order) as a permutation of `size` rows."""
    order = list(range(size))
    for i, j in enumerate(swaps.tolist()):
        order[i], order[j - 1] = order[j - 1], order[i]
    return torch.tensor(order, device=swaps.device)


def _swap_large(b: torch.Tensor, pivot: torch.Tensor, bound: float) -> int:
    """Swap pivot rows with others until no entry of `b` exceeds `bound`. Updates the coefficients `b` [out - r, r] and
    `pivot` in place. Returns the number of swaps."""
    rank = b.shape[1]
    count = 0
    while b.numel():
        flat = int(b.abs().argmax())
        i, j = divmod(flat, rank)
        p = float(b[i, j])
        if abs(p) <= bound:
            break
        column, row = b[:, j].clone(), b[i].clone()
        column[i] += 1
        row[j] -= 1
        b.addr_(column, row, alpha=-1 / p)
        pivot[j], pivot[rank + i] = pivot[rank + i].clone(), pivot[j].clone()
        count += 1
    return count
