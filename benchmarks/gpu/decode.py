"""Times whole decode steps and prefills of a model with Llama-3.1-8B's shape and random weights, as the engine runs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpu.context import PAGE_SIZE, Context, predicted_step
from gpu.models import Step, open_step
from gpu.report import Findings
from gpu.timing import median_seconds, release

TARGETS = {"interpolative bf16": 1.6, "interpolative int4": 3.5}  # speed over dense bf16 on the same backend, batch 1


def run(findings: Findings, context: Context) -> None:
    """Time every variant on every backend: decode at all batch sizes, CUDA's options at batch 1, and prefill."""
    for kind, store in context.scale.timed:
        for backend in context.backends:
            what = f"{kind} {store} {backend}"
            findings.attempt(what, lambda k=kind, s=store, b=backend: _variant(findings, context, k, s, b))
            release()


def warm(findings: Findings, context: Context, kind: str, store: str, backend: str) -> None:
    """Compile the kernels that `run` needs for a variant into Triton's cache on disk, with a model of one layer."""
    scale = context.scale
    config = scale.config | {"num_hidden_layers": 1}
    step = open_step(
        config, kind, store, backend, context.device, max_batch=max(scale.decode_rows), context=scale.context,
        graphs=False, least_pages=_pages(scale.prefill_rows),
    )  # fmt: skip
    for rows in scale.decode_rows:
        step.runner.run(step.sequences(rows))
    for tokens in scale.prefill_rows:
        step.runner.run(step.prompt(tokens))
    findings.add(what="warm", variant=f"{kind} {store}", backend=backend)


def _pages(prompts: tuple[int, ...]) -> int:
    return max(-(-n // PAGE_SIZE) for n in prompts)


def _variant(findings: Findings, context: Context, kind: str, store: str, backend: str) -> None:
    from cai_runtime.kernels import cuda

    scale = context.scale
    step = open_step(
        scale.config, kind, store, backend, context.device, max_batch=max(scale.decode_rows), context=scale.context,
        least_pages=_pages(scale.prefill_rows),
    )  # fmt: skip
    weights = f"{kind} {store}"
    for rows in scale.decode_rows:
        _measure(findings, context, step, rows, weights, backend, "")
    if backend == "cuda" and kind == "interpolative" and not context.rehearsal:
        kept = cuda.default_options
        for name, options in (
            ("no dependent launch", cuda.CudaOptions(dependent_launch=False)),
            ("gate apart", cuda.CudaOptions(fused_swiglu_rows=0)),
        ):
            cuda.default_options = options
            try:
                step.record_again([], lambda n=name: _measure(findings, context, step, 1, weights, backend, n))
            finally:
                cuda.default_options = kept
    for tokens in scale.prefill_rows:
        prompt = step.prompt(tokens)
        seconds = median_seconds(lambda p=prompt: step.runner.run(p), 5)
        flops = 2 * tokens * _parameters(step, kind, store)
        findings.add(
            what="prefill", weights=weights, backend=backend, rows=tokens, seconds=seconds,
            tokens_per_second=tokens / seconds, flops_per_second=flops / seconds,
        )  # fmt: skip
    step.runner.close()


def _parameters(step: Step, kind: str, store: str) -> float:
    """Weights of the layers' linears: multiply-adds per token."""
    return step.loader.layer_bytes / {"bf16": 2, "int8": 1, "int4": 0.5 + 2 / 128}[store]


def _measure(
    findings: Findings, context: Context, step: Step, rows: int, weights: str, backend: str, option: str
) -> None:
    import numpy as np
    import torch

    from cai_runtime.kernels.sampling import NEUTRAL, NO_TABLES, SamplingBatch

    sequences = step.sequences(rows)
    replay = step.graph(sequences)
    seconds = median_seconds(replay, 20)
    logits = replay()[:rows]
    if not bool(torch.isfinite(logits).all()) or float(logits.std()) == 0:
        raise RuntimeError(f"the logits of {rows} rows are not finite, or all alike")
    greedy = SamplingBatch(np.repeat(NEUTRAL, rows), [NO_TABLES] * rows)

    def whole() -> None:
        step.runner.sample_logits(step.runner.run(sequences), greedy).wait()

    floor = step.floor_bytes(rows) / context.bandwidth
    expected = predicted_step(backend, weights, rows) if not option else None
    findings.add(
        f"{weights} {backend} {option}, {rows} rows: {seconds * 1e3:.3f} ms, {floor / seconds:.2f} of the floor, "
        f"predicted {expected} ms",
        what="decode", weights=weights, backend=backend, option=option, rows=rows, context=step.context,
        seconds=seconds, step_seconds=_host_seconds(whole, 1 if context.rehearsal else 7), tokens_per_second=rows / seconds,
        floor_bytes=step.floor_bytes(rows), fraction_of_floor=floor / seconds, predicted_milliseconds=expected,
        measured_to_predicted=None if expected is None else seconds * 1e3 / expected,
    )  # fmt: skip


def _host_seconds(run: Callable[[], Any], repeats: int) -> float:
    """The median duration of `run` by the host's clock."""
    import time

    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]


def table(items: list[dict[str, Any]]) -> str:
    """A table of times, ratios to dense bf16 on the same backend, and predictions, then a line for each target."""
    header = (
        f"{'weights':<20}{'backend':<8}{'option':<22}{'rows':>5}{'ms':>9}{'tok/s':>9}{'of floor':>10}{'vs dense':>10}"
    )
    lines = [f"{header}{'predicted':>11}{'step ms':>9}"]
    items = [e for e in items if e["what"] == "decode"]
    dense = {(e["backend"], e["rows"]): e["seconds"] for e in items if e["weights"] == "dense bf16"}
    best = min((s for (_, rows), s in dense.items() if rows == 1), default=None)
    verdicts = []
    for e in items:
        base = dense.get((e["backend"], e["rows"]))
        ratio = f"{base / e['seconds']:.2f}x" if base else "-"
        lines.append(
            f"{e['weights']:<20}{e['backend']:<8}{e['option']:<22}{e['rows']:>5}{e['seconds'] * 1e3:>9.3f}"
            f"{e['tokens_per_second']:>9.0f}{e['fraction_of_floor']:>10.2f}{ratio:>10}"
            f"{e['predicted_milliseconds'] or 0:>11.2f}{e['step_seconds'] * 1e3:>9.3f}"
        )
        wanted = TARGETS.get(e["weights"])
        if wanted and base and best and e["rows"] == 1 and not e["option"]:
            reached = "reached" if base / e["seconds"] >= wanted else "MISSED"
            verdicts.append(
                f"{e['weights']} {e['backend']}, 1 row: {base / e['seconds']:.2f}x its own dense bf16, "
                f"{best / e['seconds']:.2f}x the fastest dense bf16; the target of {wanted}x is {reached}"
            )
    return "\n".join([*lines, *verdicts])
