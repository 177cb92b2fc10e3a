"""Times each linear of one layer of Llama-3.1-8B, beside cuBLAS and torch's int4 kernel.

Cores are interpolative at keep 0.5. A CUDA graph calls several sets of weights in turn. Together they exceed the L2 cache,
so every call reads memory. Form `bare` is the linear alone. Form `fused` adds the model's norm or gate before it and the
residual after it, which run other instances of the kernels."""

from __future__ import annotations

import math
from functools import partial
from itertools import cycle
from typing import Any

from gpu.context import INT4_GROUP, KEEP, Context, predicted_launches
from gpu.report import Findings
from gpu.timing import graph_seconds, release, sets_needed

WEIGHTS = (("interpolative", "bf16"), ("interpolative", "int8"), ("interpolative", "int4"), ("dense", "int4"))
# Relative error against float64, with bf16 activations. It is a few 1e-3, but 1e-2 for one row of a rehearsal.
TOLERANCE = 1.5e-2
FUSED = {
    "q/k/v": {"norm": True}, "o": {"residual": True}, "gate/up": {"norm": True},
    "down": {"swiglu": True, "residual": True},
}  # fmt: skip
EPS = 1e-5


def run(findings: Findings, context: Context) -> None:
    """Decode: 1 to 16 rows, bare and fused, beside cuBLAS and torch's int4 kernel (tinygemm)."""
    _groups(findings, context, context.scale.linear_rows, ("bare", "fused"), WEIGHTS, tinygemm=not context.rehearsal)


def run_many(findings: Findings, context: Context) -> None:
    """Prefill: 64 to 4096 rows, bare, beside cuBLAS on the dense matrix and cuBLAS on the factors."""
    _groups(findings, context, context.scale.many_rows, ("bare",), WEIGHTS[:3], twice=True)


def _groups(
    findings: Findings,
    context: Context,
    rows: tuple[int, ...],
    forms: tuple[str, ...],
    weights: tuple[tuple[str, str], ...],
    *,
    tinygemm: bool = False,
    twice: bool = False,
) -> None:
    for name, (inp, outs) in context.scale.groups.items():
        case = Case(findings, context, name, inp, outs, rows)
        findings.attempt(f"{name} cublas", case.cublas)
        if twice:
            findings.attempt(f"{name} cublas twice", case.cublas_twice)
        if tinygemm:
            findings.attempt(f"{name} tinygemm", case.tinygemm)
        for kind, store in weights:
            findings.attempt(f"{name} {kind} {store}", lambda k=kind, s=store, c=case: c.ours(k, s, forms))
            release()


class Case:
    """One group of linears at several numbers of rows."""

    def __init__(
        self, findings: Findings, context: Context, name: str, inp: int, outs: tuple[int, ...], rows: tuple[int, ...]
    ):
        self.findings, self.context, self.name = findings, context, name
        self.inp, self.outs, self.rows = inp, outs, rows

    def inputs(self, rows: int, width: int) -> list[Any]:
        import torch

        return [torch.randn(rows, width, device=self.context.device).bfloat16() for _ in range(8 if rows <= 64 else 2)]

    def measure(
        self, kernel: str, weights: str, rows: int, nbytes: int, parameters: int, calls: list[Any], form: str = "bare"
    ) -> None:
        """nbytes: of the weights. parameters: how many of them there are."""
        seconds = graph_seconds(calls)
        item = {
            "group": self.name, "kernel": kernel, "weights": weights, "form": form, "rows": rows, "seconds": seconds,
            "weight_bytes": nbytes, "sets": len(calls), "bytes_per_second": nbytes / seconds,
            "fraction_of_copy": nbytes / seconds / self.context.bandwidth,
            "operations_per_second": 2 * parameters * rows / seconds,
        }  # fmt: skip
        launches = predicted_launches(kernel, weights, rows)
        stages = [us for launch, us in launches.items() if launch.rsplit(" ", 1)[0] == self.name]
        if stages and form == "fused":
            item |= {"predicted_seconds": sum(stages) * 1e-6, "measured_to_predicted": seconds / sum(stages) * 1e6}
        self.findings.add(
            f"{self.name} {kernel} {weights} {form}, {rows} rows: {seconds * 1e6:.1f} us, "
            f"{item['fraction_of_copy']:.2f} of copy, {item['operations_per_second'] / 1e12:.1f} TFLOP/s",
            **item,
        )  # fmt: skip

    def cublas(self) -> None:
        import torch

        out, nbytes = sum(self.outs), 2 * self.inp * sum(self.outs)
        matrices = [
            (torch.randn(out, self.inp, device=self.context.device) / math.sqrt(self.inp)).bfloat16()
            for _ in range(sets_needed(nbytes))
        ]
        for m in self.rows:
            xs = self.inputs(m, self.inp)
            calls = [partial(torch.nn.functional.linear, x, w) for w, x in zip(matrices, cycle(xs), strict=False)]
            self.measure("cublas", "dense bf16", m, nbytes, nbytes // 2, calls)

    def cublas_twice(self) -> None:
        """The factors by cuBLAS: the first cores of all members in one product, then each second core in one of its own.
        Leaves out the permutation of the outputs by the pivots."""
        import torch

        from cai_runtime.bench.factors import Factorization

        how = Factorization("interpolative", KEEP)
        ranks = [how.rank_of(self.inp, o) or 0 for o in self.outs]
        nbytes = 2 * (sum(ranks) * self.inp + sum(r * (o - r) for r, o in zip(ranks, self.outs, strict=True)))

        def draw(rows: int, cols: int) -> Any:
            return (torch.randn(rows, cols, device=self.context.device) / math.sqrt(cols)).bfloat16()

        sets = [
            (draw(sum(ranks), self.inp), [draw(o - r, r) for r, o in zip(ranks, self.outs, strict=True)])
            for _ in range(sets_needed(nbytes))
        ]

        def call(first: Any, second: list[Any], x: Any) -> None:
            z = torch.nn.functional.linear(x, first)
            for part, w in zip(z.split(ranks, dim=1), second, strict=True):
                torch.nn.functional.linear(part, w)

        for m in self.rows:
            xs = self.inputs(m, self.inp)
            calls = [partial(call, *s, x) for s, x in zip(sets, cycle(xs), strict=False)]
            self.measure("cublas twice", "interpolative bf16", m, nbytes, nbytes // 2, calls)

    def tinygemm(self) -> None:
        import torch

        packed = [
            _tinygemm_weights(sum(self.outs), self.inp) for _ in range(sets_needed(self.inp * sum(self.outs) // 2))
        ]
        nbytes = sum(t.nbytes for t in packed[0])
        for m in self.rows:
            xs = self.inputs(m, self.inp)
            calls = [
                partial(torch._weight_int4pack_mm, x, w, INT4_GROUP, s)
                for (w, s), x in zip(packed, cycle(xs), strict=False)
            ]
            self.measure("tinygemm", "dense int4", m, nbytes, self.inp * sum(self.outs), calls)

    def ours(self, kind: str, store: str, forms: tuple[str, ...]) -> None:
        """Compare each backend's result with float64, then time it."""
        from cai_runtime.bench.factors import Factorization, RandomWeights
        from cai_runtime.kernels.gpu import prepare_linear

        draw = RandomWeights(self.context.device, group=INT4_GROUP)
        how = Factorization(kind, KEEP)
        first = draw.group_of(self.inp, self.outs, how, store)
        nbytes = sum(w.nbytes for w in first)
        groups = [first] + [draw.group_of(self.inp, self.outs, how, store) for _ in range(sets_needed(nbytes) - 1)]
        for backend in self.context.backends:
            prepared = [prepare_linear(g, backend) for g in groups]
            for form in forms:
                self.findings.attempt(
                    f"{self.name} {kind} {store} {backend} {form}",
                    lambda p=prepared, b=backend, f=form: self._ours(first, p, f"{kind} {store}", nbytes, b, f),
                )

    def _ours(self, first: Any, prepared: Any, weights: str, nbytes: int, backend: str, form: str) -> None:
        for m in self.rows:
            arguments = self._arguments(m, form)
            for rows in sorted({min(m, 4), min(m, 64)}):
                part = {k: v[:rows] if k in ("x", "residual") else v for k, v in arguments[0].items()}
                wanted = expected(first, part)
                error = float((prepared[0](**part).double() - wanted).norm() / wanted.norm())
                if not error < TOLERANCE:
                    raise RuntimeError(f"relative error {error:.2e} against float64 with {rows} rows")
            calls = [partial(f, **a) for f, a in zip(prepared, cycle(arguments), strict=False)]
            parameters = sum(math.prod(c.shape) for w in first for c in w.cores)
            self.measure(backend, weights, m, nbytes, parameters, calls, form)

    def _arguments(self, rows: int, form: str) -> list[dict[str, Any]]:
        """Arguments of the linear's calls: the inputs and, if fused, the model's norm, gate and residual."""
        import torch

        from cai_runtime.kernels.norm import RmsNorm

        fused = FUSED[self.name] if form == "fused" else {}
        xs = self.inputs(rows, self.inp * (2 if fused.get("swiglu") else 1))
        extra: dict[str, Any] = {}
        if fused.get("norm"):
            extra["norm"] = RmsNorm((torch.rand(self.inp, device=self.context.device) + 0.5).bfloat16(), EPS)
        if fused.get("swiglu"):
            extra["swiglu"] = True
        if fused.get("residual"):
            extra["residual"] = torch.randn(rows, sum(self.outs), device=self.context.device).bfloat16()
        return [{"x": x, **extra} for x in xs]


def expected(members: Any, arguments: dict[str, Any]) -> Any:
    """The group's result in float64, computed from the same arguments without rounding in between."""
    import torch

    from cai_runtime.kernels.activation import swiglu_reference
    from cai_runtime.kernels.norm import rms_norm_reference
    from cai_runtime.kernels.slim_linear import reference

    x = arguments["x"].double()
    if "norm" in arguments:
        x = rms_norm_reference(x, arguments["norm"].weight.double(), arguments["norm"].eps)
    if arguments.get("swiglu"):
        x = swiglu_reference(x)
    y = torch.cat([reference(x, w) for w in members], dim=1)
    return y + arguments["residual"].double() if "residual" in arguments else y


def _tinygemm_weights(out: int, inp: int) -> tuple[Any, Any]:
    """A random matrix for torch's int4 kernel: packed codes, and bf16 scales with zero points [groups, out, 2]."""
    import torch

    codes = torch.randint(0, 256, (out, inp // 2), dtype=torch.uint8, device="cuda")
    packed = torch._convert_weight_to_int4pack(codes, 8)
    scales = torch.rand(inp // INT4_GROUP, out, 2, device="cuda").bfloat16()
    return packed, scales


def table(items: list[dict[str, Any]]) -> str:
    header = f"{'group':<9}{'kernel':<13}{'weights':<20}{'form':<7}{'rows':>5}{'us':>9}{'GB/s':>7}{'of copy':>9}"
    lines = [f"{header}{'vs cuBLAS':>11}{'of predicted':>14}"]
    dense = {(e["group"], e["rows"]): e["seconds"] for e in items if e["kernel"] == "cublas"}
    for e in items:
        base = dense.get((e["group"], e["rows"]))
        speedup = f"{base / e['seconds']:.2f}x" if base else "-"
        ratio = f"{e['measured_to_predicted']:.2f}" if "measured_to_predicted" in e else "-"
        lines.append(
            f"{e['group']:<9}{e['kernel']:<13}{e['weights']:<20}{e['form']:<7}{e['rows']:>5}{e['seconds'] * 1e6:>9.1f}"
            f"{e['bytes_per_second'] / 1e9:>7.0f}{e['fraction_of_copy']:>9.2f}{speedup:>11}{ratio:>14}"
        )
    return "\n".join(lines)
