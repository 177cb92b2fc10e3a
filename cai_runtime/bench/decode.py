"""Measures decode speed, in the same way for every engine.

A run submits `batch` prompts of `prompt_tokens` random tokens at once. The engine continues each greedily by exactly
`tokens` tokens; the end-of-text token does not stop it. Each engine is called as its users call it: our `Engine.submit`,
llama.cpp's server with a slot per prompt, transformers' `generate`. Nothing streams and no prefix is reused. Every run has
new prompts, the same ones for every engine. After a warm-up, each repeat takes two times, from the submission of all
prompts to the end of the last reply:

    first   every prompt continued by one token: the prefill
    whole   every prompt continued by `tokens` tokens

The figures come from the medians over the repeats:

    time to first token     time until a request of `first` is done, median over the batch
    prefill tokens/s        batch * prompt_tokens / first
    decode tokens/s         batch * (tokens - 1) / (whole - first)
    GB/s                    bytes that a decode step must read / time of a step. The bytes are the stored weights, and
                            the keys and values at the mean context length. The embedding table counts only if it is
                            also the head: else a step reads single rows of it
    of the floor            GB/s / bandwidth of a streaming read with as many threads, measured in the same run
                            (`bandwidth.py`)

Choose `tokens` so that a run takes a second or more; else the difference of the two times drowns in noise. Each engine and
batch size runs in a process of its own, one at a time, so that thread pools and caches do not interfere.
"""

from __future__ import annotations

import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Protocol

from cai_runtime.errors import BenchmarkError

if TYPE_CHECKING:
    from cai_runtime.slim.reader import Checkpoint

WARM_UP_TOKENS = 8
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class DecodeSettings:
    """One measurement. device: a resolved name ("cpu", "cuda:0"). threads: of the CPU."""

    batch: int
    tokens: int
    prompt_tokens: int
    repeats: int
    threads: int
    vocab_size: int
    kv_elements: int  # cached numbers per position, over all layers
    device: str = "cpu"
    dtype: str = "auto"
    seed: int = 0

    def prompts(self, run: int) -> list[list[int]]:
        """The `batch` prompts of run `run`: tokens of the middle half of the vocabulary, which has no control tokens."""
        draw = random.Random(f"{self.seed} {run}")
        low, high = self.vocab_size // 4, max(self.vocab_size * 3 // 4, self.vocab_size // 4 + 1)
        return [[draw.randrange(low, high) for _ in range(self.prompt_tokens)] for _ in range(self.batch)]


@dataclass(frozen=True)
class DecodeResult:
    """Figures of one engine at one batch size: medians over the repeats. None: below the noise."""

    engine: str
    weights: str  # their number format
    batch: int
    decode_tokens_per_s: float | None  # of all sequences together
    step_ms: float | None  # one token of each sequence
    first_token_ms: float
    prefill_tokens_per_s: float
    weight_bytes: int
    kv_bytes: int  # of all sequences at their mean length
    gb_per_s: float | None
    first_s: tuple[float, ...]  # of every repeat
    whole_s: tuple[float, ...]
    versions: dict[str, str]

    def to_json(self, bandwidth: float) -> dict[str, Any]:
        """All fields and the fraction of the floor. bandwidth: bytes per second."""
        return {**asdict(self), "floor_fraction": self.floor_fraction(bandwidth)}

    def floor_fraction(self, bandwidth: float) -> float | None:
        return None if self.gb_per_s is None else self.gb_per_s * 1e9 / bandwidth


class Subject(Protocol):
    """A loaded engine that is measured."""

    engine: str
    weights: str
    weight_bytes: int  # read by a decode step
    kv_item_bytes: int  # bytes of one cached number
    versions: dict[str, str]

    def generate(self, prompts: list[list[int]], tokens: int) -> list[float]:
        """Continue all prompts at once, greedily, by exactly `tokens` tokens each.

        Returns the seconds from the start of the call to the end of each reply. Raises BenchmarkError if a reply has
        another length.
        """
        ...

    def close(self) -> None: ...


def measure(subject: Subject, settings: DecodeSettings) -> DecodeResult:
    """Warm up and take the times that the module describes. Raises BenchmarkError for fewer than two tokens."""
    if settings.tokens < 2:
        raise BenchmarkError(f"tokens is {settings.tokens}; decoding begins with the second token, so give more")
    subject.generate(settings.prompts(0), min(WARM_UP_TOKENS, settings.tokens))
    firsts: list[list[float]] = []
    wholes: list[float] = []
    for repeat in range(settings.repeats):
        firsts.append(subject.generate(settings.prompts(2 * repeat + 1), 1))
        wholes.append(max(subject.generate(settings.prompts(2 * repeat + 2), settings.tokens)))
    first = median(max(times) for times in firsts)
    steps = settings.tokens - 1
    decoding = median(wholes) - first
    step = decoding / steps if decoding > 0 else None
    mean_context = settings.prompt_tokens + settings.tokens / 2
    kv_bytes = round(settings.batch * mean_context * settings.kv_elements * subject.kv_item_bytes)
    return DecodeResult(
        engine=subject.engine,
        weights=subject.weights,
        batch=settings.batch,
        decode_tokens_per_s=settings.batch / step if step else None,
        step_ms=step * 1e3 if step else None,
        first_token_ms=median(median(times) for times in firsts) * 1e3,
        prefill_tokens_per_s=settings.batch * settings.prompt_tokens / first,
        weight_bytes=subject.weight_bytes,
        kv_bytes=kv_bytes,
        gb_per_s=(subject.weight_bytes + kv_bytes) / step / 1e9 if step else None,
        first_s=tuple(max(times) for times in firsts),
        whole_s=tuple(wholes),
        versions=subject.versions,
    )


class OurEngine:
    """Our engine over a slim or dense checkpoint, without the prefix cache."""

    engine = "cai_runtime"

    def __init__(self, path: Path, settings: DecodeSettings):
        import torch

        from cai_runtime.bench.machine import versions
        from cai_runtime.engine.open import PAGE_SIZE, choose_dtype, open_engine
        from cai_runtime.kernels import cpu_library
        from cai_runtime.kernels.backend import resolve_backend
        from cai_runtime.slim.reader import Checkpoint

        torch.set_num_threads(settings.threads)
        if settings.device == "cpu" and cpu_library.available():
            cpu_library.set_num_threads(settings.threads)
        backend = resolve_backend(None, settings.device)
        with Checkpoint.open(path) as checkpoint:
            dtype = choose_dtype(settings.dtype, checkpoint.config, backend)
            held = None if dtype is None else str(dtype).removeprefix("torch.")
            self.weight_bytes = step_weight_bytes(checkpoint, held)
            self.weights = stores(checkpoint)
        # The KV cache has the activations' dtype; the CPU kernels' activations are fp32.
        self.kv_item_bytes = ITEM_BYTES["float32" if backend == "cpu" or held is None else held]
        self.versions = {name: str(version) for name, version in versions().items()} | {"kernels": backend}
        self._engine = open_engine(
            path,
            device=settings.device,
            dtype=settings.dtype,
            max_batch=settings.batch,
            # The KV cache has at least two pages.
            max_context=max(settings.prompt_tokens + settings.tokens, 2 * PAGE_SIZE),
            progress=False,
            prefix_cache=False,
        )

    def generate(self, prompts: list[list[int]], tokens: int) -> list[float]:
        from cai_runtime.engine.request import Request, SamplingParams

        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        start = time.perf_counter()
        handles = [self._engine.submit(Request(prompt, params)) for prompt in prompts]
        done = []
        for handle in handles:  # they end in this order: the scheduler is first come, first served
            check_length(self.engine, handle.result().completion_tokens, tokens)
            done.append(time.perf_counter() - start)
        if preemptions := self._engine.stats().preemptions:
            raise BenchmarkError(f"the KV cache is too small for this batch: {preemptions} sequences were preempted")
        return done

    def close(self) -> None:
        self._engine.close()


def check_length(engine: str, got: int, wanted: int) -> None:
    if got != wanted:
        raise BenchmarkError(f"{engine} generated {got} tokens, not {wanted}: the times are not comparable")


def step_weight_bytes(checkpoint: Checkpoint, held: str | None) -> int:
    """Bytes of weights that a decode step reads. held: the dtype of float weights in memory; None: as stored."""
    total = 0
    for name, info in checkpoint.tensors().items():
        if name.startswith("model.embed_tokens.") and checkpoint.has_module("lm_head"):
            continue
        stored = {"F32": 4, "BF16": 2, "F16": 2}.get(info.dtype)
        scale = name.endswith("_scale")  # fp32 whatever `held` is
        factor = ITEM_BYTES[held] / stored if held is not None and stored is not None and not scale else 1
        total += round(info.nbytes * factor)
    return total


def stores(checkpoint: Checkpoint) -> str:
    """The kind and store, or the dtype, of most of the checkpoint's bytes: "interpolative int8", "F32"."""
    if checkpoint.is_slim:
        counts: dict[str, int] = {}
        for spec in checkpoint.modules.values():
            label = f"{spec.kind} {spec.store[0]}"
            counts[label] = counts.get(label, 0) + spec.nbytes
    else:
        counts = {}
        for info in checkpoint.tensors().values():
            counts[info.dtype] = counts.get(info.dtype, 0) + info.nbytes
    return max(counts, key=lambda label: counts[label])


def kv_elements(config: dict[str, Any]) -> int:
    """Cached numbers per position over all layers, from config.json."""
    heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
    return 2 * int(config["num_hidden_layers"]) * int(config.get("num_key_value_heads") or heads) * head_dim
