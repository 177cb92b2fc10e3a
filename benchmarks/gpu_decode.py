"""A whole decode step of a model of Llama-3.1-8B's shape with random weights, as the engine runs it: the part of
gpu_suite.py that speaks of tokens. The weights are drawn on the device; there is no checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_linears import INT4_GROUP, KEEP
from gpu_timing import median_seconds

LLAMA_8B: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
TINY: dict[str, Any] = LLAMA_8B | {
    "hidden_size": 128, "intermediate_size": 448, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 256,
}  # fmt: skip
# Kind and store of the layers' linears. The head and the embedding are dense bf16 throughout.
VARIANTS = (
    ("dense", "bf16"), ("interpolative", "bf16"), ("interpolative", "int8"), ("interpolative", "int4"), ("dense", "int4"),
)  # fmt: skip
TARGETS = {"interpolative bf16": 1.6, "interpolative int4": 3.5}  # times dense bf16 of the same kernels, batch 1
CONTEXT = 1024
BATCHES = (1, 4, 16)
PAGE_SIZE = 16


class _RandomCheckpoint:
    """What of a checkpoint a model definition asks for beside weights."""

    def __init__(self, config: dict[str, Any]):
        self.config, self.path = config, Path("random")

    def module_tensors(self, name: str) -> list[str]:
        return []

    def release(self, *names: Any) -> None: ...


@dataclass
class RandomLoader:
    """Stands for a `WeightLoader`: every linear of the layers drawn in one kind and store, head and embedding dense bf16."""

    config: dict[str, Any]
    device: Any
    activation_dtype: Any
    backend: str
    kind: str
    store: str
    arena: Any = None
    layer_bytes: int = 0
    head_bytes: int = 0
    checkpoint: Any = field(init=False)

    def __post_init__(self) -> None:
        from cai_runtime.bench.factors import RandomWeights

        self.checkpoint = _RandomCheckpoint(self.config)
        self.dtype = self.activation_dtype
        self._draw = RandomWeights(str(self.device), group=INT4_GROUP)

    def weights(self, name: str, shape: tuple[int, int]) -> Any:
        from cai_runtime.bench.factors import Factorization

        out, inp = shape
        dense = "layers" not in name
        w = self._draw.linear(
            inp, out, Factorization("dense" if dense else self.kind, KEEP), "bf16" if dense else self.store
        )
        if dense:
            self.head_bytes = w.nbytes  # the embedding's twin: a step reads one row of that
        else:
            self.layer_bytes += w.nbytes
        return w

    def linear(self, names: Sequence[str], shapes: Sequence[tuple[int, int]]) -> Any:
        from cai_runtime.kernels.prepare import prepare

        return prepare([self.weights(n, s) for n, s in zip(names, shapes, strict=True)], backend=self.backend)

    def vector(self, name: str, size: int, dtype: Any = None) -> Any:
        import torch

        return torch.ones(size, dtype=dtype or self.activation_dtype, device=self.device)


@dataclass
class Step:
    """An open model whose sequences stand at `context` positions, about to decode one token each."""

    runner: Any
    loader: RandomLoader
    config: dict[str, Any]
    context: int

    def sequences(self, batch: int) -> list[Any]:
        from cai_runtime.engine.runner import ScheduledSequence

        pages = -(-(self.context + 1) // PAGE_SIZE)
        vocabulary = self.config["vocab_size"]
        return [
            ScheduledSequence(
                [(7919 * i + 1) % vocabulary], self.context, list(range(i * pages, (i + 1) * pages)), True
            )
            for i in range(batch)
        ]

    def floor_bytes(self, batch: int) -> int:
        """What a step must read: the layers' weights, the head, the keys and values of every sequence."""
        heads, layers = self.config["num_key_value_heads"], self.config["num_hidden_layers"]
        dim = self.config["hidden_size"] // self.config["num_attention_heads"]
        return self.loader.layer_bytes + self.loader.head_bytes + batch * self.context * 2 * 2 * heads * dim * layers


def open_step(
    config: dict[str, Any],
    kind: str,
    store: str,
    backend: str,
    device: str,
    *,
    max_batch: int,
    context: int,
    graphs: bool = True,
    capture: Callable[[Any], Any] | None = None,
) -> Step:
    import torch

    from cai_runtime.engine.model_runner import ModelRunner
    from cai_runtime.models.registry import build_model

    dtype = torch.bfloat16
    loader = RandomLoader(config, torch.device(device), dtype, backend, kind, store)
    model = build_model(loader)  # type: ignore[arg-type]
    pages = max_batch * -(-(context + 1) // PAGE_SIZE)
    runner = ModelRunner(
        model, num_pages=pages, page_size=PAGE_SIZE, cache_dtype=dtype, cuda_graphs=graphs, max_batch=max_batch,
        capture=capture,
    )  # fmt: skip
    return Step(runner, loader, config, context)


def time_decode(
    entries: list[dict[str, Any]], bandwidth: float, backends: list[str], checkpoint: Callable[[], None]
) -> None:
    """Every variant on every backend at every batch. `entries` grows; what fails is named in the RuntimeError at the end.
    checkpoint: called before each variant; what it raises ends the section."""
    import torch

    from cai_runtime.kernels import cuda

    problems = []
    for backend in backends:
        for kind, store in VARIANTS:
            what = f"{kind} {store} {backend}"
            checkpoint()
            try:
                began = time.perf_counter()
                step = open_step(
                    LLAMA_8B, kind, store, backend, "cuda", max_batch=max(BATCHES), context=CONTEXT
                )  # fmt: skip
                for batch in BATCHES:
                    measured = _measured(step, batch, what, backend, bandwidth)
                    entries.append(measured)
                if backend == "cuda" and kind == "interpolative":
                    for name, options in (
                        ("no dependent launch", cuda.CudaOptions(dependent_launch=False)),
                        ("gate apart", cuda.CudaOptions(fused_swiglu_rows=0)),
                    ):
                        entries.append(_with_options(options, step, 1, f"{what}, {name}", bandwidth))
                step.runner.close()
                del step
                print(f"{what}: {time.perf_counter() - began:.1f} s in all", flush=True)
            except Exception as error:  # noqa: BLE001  # the other variants are still wanted
                problems.append(f"{what}: {type(error).__name__}: {error}")
                print(problems[-1][:800], flush=True)
            torch.cuda.empty_cache()
    if problems:
        raise RuntimeError("; ".join(p[:300] for p in problems))


def _measured(step: Step, batch: int, what: str, backend: str, bandwidth: float) -> dict[str, Any]:
    import numpy as np
    import torch

    from cai_runtime.kernels.sampling import NEUTRAL, NO_TABLES, SamplingBatch

    sequences = step.sequences(batch)
    replay = step.runner.recorded(sequences)
    seconds = median_seconds(replay, 20)
    logits = replay()[:batch]
    if not bool(torch.isfinite(logits).all()) or float(logits.std()) == 0:
        raise RuntimeError(f"the logits at batch {batch} are not finite, or all alike")
    greedy = SamplingBatch(np.repeat(NEUTRAL, batch), [NO_TABLES] * batch)
    whole = []
    for _ in range(10):
        began = time.perf_counter()
        step.runner.sample_logits(step.runner.run(sequences), greedy).wait()
        whole.append(time.perf_counter() - began)
    floor = step.floor_bytes(batch) / bandwidth
    entry = {
        "variant": what, "backend": backend, "batch": batch, "context": step.context, "seconds": seconds,
        "engine_step_seconds": sorted(whole)[len(whole) // 2], "tokens_per_second": batch / seconds,
        "floor_bytes": step.floor_bytes(batch), "fraction_of_floor": floor / seconds,
    }  # fmt: skip
    print(f"{what}, batch {batch}: {seconds * 1e3:.3f} ms, {floor / seconds:.2f} of the floor", flush=True)
    return entry


def _with_options(options: Any, step: Step, batch: int, what: str, bandwidth: float) -> dict[str, Any]:
    """Measured with graphs recorded under other options of the CUDA launches; afterwards all is as before."""
    from cai_runtime.kernels import cuda

    graphs, kept = step.runner._graphs, cuda.default_options
    recorded, graphs._recorded = graphs._recorded, {}
    cuda.default_options = options
    try:
        return _measured(step, batch, what, "cuda", bandwidth)
    finally:
        cuda.default_options = kept
        graphs._recorded = recorded


def table(entries: list[dict[str, Any]]) -> str:
    """Times, and ratios to dense bf16 of the same kernels."""
    lines = [f"{'variant':<48}{'batch':>6}{'ms':>9}{'tok/s':>9}{'of floor':>10}{'vs dense':>10}{'engine ms':>11}"]
    dense = {(e["backend"], e["batch"]): e["seconds"] for e in entries if e["variant"].startswith("dense bf16")}
    best = min((s for (_, batch), s in dense.items() if batch == 1), default=None)
    verdicts = []
    for e in entries:
        base = dense.get((e["backend"], e["batch"]))
        ratio = f"{base / e['seconds']:.2f}x" if base else "-"
        lines.append(
            f"{e['variant']:<48}{e['batch']:>6}{e['seconds'] * 1e3:>9.3f}{e['tokens_per_second']:>9.0f}"
            f"{e['fraction_of_floor']:>10.2f}{ratio:>10}{e['engine_step_seconds'] * 1e3:>11.3f}"
        )
        wanted = TARGETS.get(e["variant"].removesuffix(f" {e['backend']}"))
        if wanted and base and best and e["batch"] == 1:
            reached = "reached" if base / e["seconds"] >= wanted else "MISSED"
            verdicts.append(
                f"{e['variant']}, batch 1: {base / e['seconds']:.2f}x its own dense bf16, {best / e['seconds']:.2f}x the "
                f"fastest dense bf16; the target of {wanted}x is {reached}"
            )
    return "\n".join([*lines, *verdicts])


def check_decode_on_cpu() -> dict[str, float]:
    """Without a GPU: a tiny model of every variant through the runner, its buffers and padding, nothing recorded; returns
    the bytes that each would read, over dense bf16's."""
    import torch

    read = {}
    for kind, store in VARIANTS:
        steps = [
            open_step(
                TINY, kind, store, "reference", "cpu", max_batch=5, context=20, graphs=graphs, capture=lambda f: f
            )
            for graphs in (True, False)
        ]
        padded, plain = (s.runner.run(s.sequences(3)) for s in steps)
        if not torch.isfinite(padded).all() or float((padded - plain).abs().max()) > 0.05 * float(plain.std()):
            raise RuntimeError(f"{kind} {store}: a padded step gives other logits than a plain one")
        read[f"{kind} {store}"] = steps[0].loader.layer_bytes
    dense = read["dense bf16"]
    return {name: round(nbytes / dense, 3) for name, nbytes in read.items()}
