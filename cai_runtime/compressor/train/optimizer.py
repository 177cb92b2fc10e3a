"""`WhitenedMuon`: Muon in coordinates whitened by the second moment of a core's inputs.

Whitening. The inputs z of a core are strongly correlated: a few directions carry most of their energy. Adam changes all
entries by about the same amount. The strong directions then bound its rate, and the weak ones hardly move. So a core
C [rows, columns] is trained as Z = C G^(1/2), G = mean z z^T: every entry of Z moves the outputs equally (as in "K-FAC",
Martens and Grosse, 2015). G comes from the calibration text and stays fixed.

Step. A step moves Z along the orthogonal matrix nearest to the momentum of its gradient ("Muon", Jordan, Jin, Boza, You,
Cesista, Newhouse and Bernstein, 2024). All directions advance equally, which matters with only a few hundred steps.
Vectors (norms, biases) take Adam steps (Kingma and Ba, 2015).

With M the momentum of C's gradient, the momentum of Z's gradient is M G^(-1/2), and the step of C is

    (M G^-1 M^T)^(-1/2) M G^-1.

No root of G is needed. The iteration runs on a square matrix of C's smaller side.

SmolLM2-135M at keep 0.5, after 24 steps of 1,024 tokens, on unseen text: divergence 1.27 nats and 3.2 times the dense
perplexity; with Adam on Z 1.37 nats and 3.6 times.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from cai_runtime.compressor.factor.decompose import damped
from cai_runtime.compressor.train.student import TrainableLinear

BETAS = (0.9, 0.99)  # decay of the momentum (Muon and Adam), and of Adam's second moment
EPSILON = 1e-12  # added to the root of Adam's second moment, in units of the gradient
# Coefficients (a, b, c) of odd polynomials a x + b x^3 + c x^5. Composed, they map singular values in [0.02, 1] to within
# 0.1 of 1. Each is optimal on the range of the one before (Amsel, Persson, Musco and Gower, "The Polar Express", 2025).
POLAR = ((7.7110, -22.1138, 16.2487), (3.2153, -2.4112, 0.5013), (2.2183, -1.5940, 0.4107))


class Metric(NamedTuple):
    """The whitening of one core's inputs z.

    inverse: G^-1, [columns, columns] fp32, G the damped mean of z z^T divided by its mean diagonal. root: the lower
    triangular L with L L^T = G^-1, [columns, columns] fp32; then Z = C L^-T.
    """

    inverse: torch.Tensor
    root: torch.Tensor


class WhitenedMuon(torch.optim.Optimizer):
    """Muon on whitened matrices, Adam on vectors.

    rate: relative step size; one step moves the entries of Z by about `rate` times the RMS of the initial Z. metrics: by
    parameter; a parameter without a metric is not whitened.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        rate: float,
        metrics: Mapping[nn.Parameter, Metric] | None = None,
    ):
        groups = []
        for p in parameters:
            metric, z, basis = (metrics or {}).get(p), p.detach().float(), None
            if metric is not None:
                z = torch.linalg.solve_triangular(metric.root.mT, z, upper=True, left=False)
                basis = metric.inverse if _wide(p) else metric.root
            size = float(z.square().mean().sqrt()) if z.numel() else 0.0
            groups.append({"params": [p], "whole": rate * size, "lr": rate * size, "basis": basis})
        super().__init__(groups, {})

    def set_rate(self, share: float) -> None:
        """Set every learning rate to `share` of its initial value."""
        for group in self.param_groups:
            group["lr"] = group["whole"] * share

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every parameter that has a gradient. closure: ignored."""
        for group in self.param_groups:
            (p,) = group["params"]
            if p.grad is not None:
                move = self._orthogonal(p, group["basis"]) if p.ndim == 2 else self._adam(p)
                p.add_(move, alpha=-group["lr"])

    def _orthogonal(self, p: nn.Parameter, basis: torch.Tensor | None) -> torch.Tensor:
        state = self.state[p]
        assert p.grad is not None
        if not state:
            state["momentum"] = torch.zeros_like(p.grad)
        state["momentum"].lerp_(p.grad, 1 - BETAS[0])
        return orthogonalized(state["momentum"], basis) * max(p.shape) ** 0.5

    def _adam(self, p: nn.Parameter) -> torch.Tensor:
        state = self.state[p]
        gradient = p.grad
        assert gradient is not None
        if not state:
            state |= {name: torch.zeros_like(gradient) for name in ("exp_avg", "exp_avg_sq")}
            state["step"] = torch.zeros((), dtype=torch.int64)
        state["step"] += 1
        state["exp_avg"].lerp_(gradient, 1 - BETAS[0])
        state["exp_avg_sq"].mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        first, second = (1 - beta ** int(state["step"]) for beta in BETAS)
        return state["exp_avg"] / first / (state["exp_avg_sq"] / second).sqrt_().add_(EPSILON)


def _wide(matrix: torch.Tensor) -> bool:
    return matrix.shape[0] <= matrix.shape[1]


def orthogonalized(matrix: torch.Tensor, basis: torch.Tensor | None = None) -> torch.Tensor:
    """O L^T, [rows, columns] fp32, with O approximately the orthogonal matrix nearest to `matrix` @ L.

    The singular values of O lie in [0.9, 1.1], but for those where `matrix` @ L has one far below its largest.

    matrix: [rows, columns]. basis: [columns, columns] fp32: L L^T if rows <= columns, else L (see `Metric`); None: identity.
    """
    m = matrix / (matrix.norm() + torch.finfo(torch.float32).tiny)
    if _wide(m):
        whitened = m if basis is None else m @ basis
        return _inverse_root(whitened @ m.mT) @ whitened
    square = m.mT @ m
    if basis is None:
        return m @ _inverse_root(square)
    return m @ (basis @ _inverse_root(basis.mT @ square @ basis) @ basis.mT)


def _inverse_root(square: torch.Tensor) -> torch.Tensor:
    """Approximately X^(-1/2) of a positive semidefinite matrix X [n, n]. Its norm is at most 60 / ||X||^(1/2)."""
    scale = square.norm() + torch.finfo(torch.float32).tiny  # the Frobenius norm bounds every eigenvalue
    x, found = square / scale, None
    for k, (a, b, c) in enumerate(POLAR):
        factor = torch.addmm(x, x, x, beta=b, alpha=c)
        factor.diagonal().add_(a)
        found = factor if found is None else found @ factor
        if k + 1 < len(POLAR):
            x = factor @ x @ factor
    assert found is not None
    return found / scale.sqrt()


def whitening(gram: torch.Tensor) -> Metric:
    """The metric of inputs z. gram: the mean of z z^T, [n, n]. Damping bounds the inverse in directions without inputs."""
    gram = damped(gram)
    gram /= gram.diagonal().mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    return Metric(inverse.float(), torch.linalg.cholesky(inverse).float())


def core_metrics(layers: Sequence[tuple[TrainableLinear, torch.Tensor]]) -> dict[nn.Parameter, Metric]:
    """The metric of every core's `latent`, for `WhitenedMuon`.

    layers: pairs of a layer and the mean of x x^T of its inputs, [in, in]. Layers with the same inputs should pass the same
    tensor object: its metric is then computed once. MPO cores get no metric: their inputs mix several sites.
    """
    found: dict[nn.Parameter, Metric] = {}
    shared: dict[int, Metric] = {}
    for layer, gram in layers:
        if layer.spec.kind == "mpo":
            continue
        if id(gram) not in shared:
            shared[id(gram)] = whitening(gram)
        first, *others = layer.parts()
        found[first.latent] = shared[id(gram)]
        if others:
            core = first.latent.detach().double()
            found[others[0].latent] = whitening(core @ gram.to(core) @ core.mT)
    return found
