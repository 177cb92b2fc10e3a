"""Measures prefill speed of a checkpoint, beside transformers.

Each engine continues one prompt of random tokens at a time by one token, called as its users call it (`decode.py`). Every
run has a new prompt, the same ones for every engine. No prefix is reused.

    tokens/s     prompt tokens / median time
    floor        two operations per stored parameter of the linears and prompt token, over the matrix rate in the engine's
                 compute dtype, measured in the same run. Attention is left out, and so is the head, which runs only for
                 the last token.

Each engine and prompt length runs in a process of its own, one at a time, so that thread pools and caches do not interfere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from cai_runtime.bench.checks import check_at_least, check_same_model
from cai_runtime.bench.child import run_child
from cai_runtime.bench.decode import DecodeSettings
from cai_runtime.bench.machine import describe_machine, usable_threads, versions
from cai_runtime.bench.report import processor
from cai_runtime.bench.roofs import Roofs
from cai_runtime.errors import BenchmarkError
from cai_runtime.tables import aligned, figure

if TYPE_CHECKING:
    from cai_runtime.slim.reader import Checkpoint


@dataclass(frozen=True)
class PrefillResult:
    """One engine at one prompt length. linear_parameters: stored parameters of the linears."""

    engine: str
    weights: str
    prompt_tokens: int
    seconds: tuple[float, ...]  # of every repeat
    linear_parameters: int
    versions: dict[str, str]

    @property
    def median_s(self) -> float:
        return median(self.seconds)

    @property
    def tokens_per_s(self) -> float:
        return self.prompt_tokens / self.median_s

    @property
    def computes(self) -> str:
        """The dtype of the products. Our CPU kernels compute in fp32, whatever the weights are stored as."""
        if self.engine == "transformers":
            return self.weights
        return "float32" if self.versions["kernels"] == "cpu" else "bfloat16"

    @property
    def flops(self) -> int:
        """Operations of the linears."""
        return 2 * self.linear_parameters * self.prompt_tokens


@dataclass(frozen=True)
class PrefillReport:
    checkpoint: str
    peer: str | None
    device: str
    date: str
    machine: dict[str, Any]
    versions: dict[str, str | None]
    settings: dict[str, Any]
    roofs: Roofs
    results: list[PrefillResult]

    def floor_fraction(self, r: PrefillResult) -> float:
        return r.flops / self.roofs.rate(r.computes) / r.median_s

    def speedup(self, r: PrefillResult, dtype: str) -> float | None:
        """Time of transformers in `dtype` on a prompt of the same length over r's time; None if it was not measured."""
        for other in self.results:
            if (other.engine, other.weights, other.prompt_tokens) == ("transformers", dtype, r.prompt_tokens):
                return other.median_s / r.median_s
        return None


def bench_prefill(
    checkpoint: str | Path,
    *,
    prompts: Sequence[int] = (128, 512, 2048),
    repeats: int = 3,
    threads: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    peer: str | Path | None = None,
    progress: bool | None = None,
) -> PrefillReport:
    """Measure a checkpoint directory at every prompt length, as the module describes.

    Args:
        prompts: lengths in tokens.
        repeats: timed prompts of each length.
        threads: of the CPU; default: all that this process may use.
        device, dtype: as `EngineOptions` takes them.
        peer: the same model as a dense directory, for transformers in fp32 and bf16; None leaves transformers out.
        progress: a progress bar on stderr; None shows it on a terminal only.

    Raises:
        BenchmarkError: an argument is out of range, a prompt is longer than the context, a measurement failed, or the peer
            is another model.
        CheckpointError: the checkpoint can't be read.
    """
    from cai_runtime.progress import progress_bar
    from cai_runtime.slim.reader import Checkpoint

    path = Path(checkpoint).expanduser().absolute()
    dense = None if peer is None else Path(peer).expanduser().absolute()
    threads = usable_threads() if threads is None else threads
    check_at_least(1, prompt=min(prompts, default=0), repeats=repeats, threads=threads)
    with Checkpoint.open(path) as opened:
        config, parameters = opened.config, {"cai_runtime": linear_parameters(opened)}
    longest = int(config.get("max_position_embeddings") or 0)
    if longest and max(prompts) >= longest:
        raise BenchmarkError(f"a prompt of {max(prompts)} tokens and one more don't fit in the model's {longest}")
    if dense is not None:
        check_same_model(config, dense)
        with Checkpoint.open(dense) as opened:
            parameters["transformers"] = linear_parameters(opened)
    base = DecodeSettings(
        batch=1, tokens=1, prompt_tokens=1, repeats=repeats, threads=threads, vocab_size=int(config["vocab_size"]),
        kv_elements=0, dtype=dtype,
    )  # fmt: skip
    planned = [("cai_runtime", path, replace(base, prompt_tokens=n)) for n in prompts]
    if dense is not None:
        for kind in ("float32", "bfloat16"):
            planned += [("transformers", dense, replace(base, prompt_tokens=n, dtype=kind)) for n in prompts]
    planned.sort(key=lambda job: job[2].prompt_tokens)  # a change of the machine's speed then affects all engines
    with progress_bar("measure", total=len(planned) + 2, unit="run", show=progress) as bar:

        def child(label: str, job: dict[str, Any]) -> Any:
            bar.set_postfix_str(label)
            result = run_child(job, threads=threads)
            bar.update()
            return result

        before = child("roofs", {"do": "roofs.both", "device": device})
        results = []
        for subject, where, settings in planned:
            settings = replace(settings, device=before["device"])
            job = {"do": "subjects.prefill", "subject": subject, "path": str(where), "settings": asdict(settings)}
            found = child(f"{subject}, {settings.prompt_tokens} tokens", job)
            results.append(PrefillResult(**found, linear_parameters=parameters[subject]))
        after = child("roofs", {"do": "roofs.both", "device": device})
    return PrefillReport(
        checkpoint=path.name,
        peer=None if dense is None else dense.name,
        device=before["device"],
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        machine={**describe_machine(), "gpu": before["gpu"]},
        versions=versions(),
        settings={"prompts": list(prompts), "repeats": repeats, "threads": threads, "dtype": dtype},
        roofs=Roofs(before["read"], before["matmul"]).higher(Roofs(after["read"], after["matmul"])),
        results=results,
    )


def linear_parameters(checkpoint: Checkpoint) -> int:
    """Stored parameters of the linears that every prompt token passes: all but embedding and head."""
    outside = ("model.embed_tokens", "lm_head")
    total = sum(spec.parameters for name, spec in checkpoint.modules.items() if name not in outside)
    for name, info in checkpoint.tensors().items():
        module = name.removesuffix(".weight")
        if module != name and len(info.shape) == 2 and module not in outside and module not in checkpoint.modules:
            total += info.shape[0] * info.shape[1]
    return total


def format_prefill(report: PrefillReport) -> str:
    """The table that `cai bench prefill DIR` prints."""
    s = report.settings
    table: list[Sequence[str]] = [
        ("prompt", "engine", "weights", "tok/s", "median ms", "GFLOP/s", "of floor", "vs fp32", "vs bf16")
    ]
    for r in report.results:
        ratios = [report.speedup(r, dtype) for dtype in ("float32", "bfloat16")]
        table.append(
            (
                str(r.prompt_tokens),
                r.engine,
                r.weights,
                figure(r.tokens_per_s),
                figure(r.median_s * 1e3),
                figure(r.flops / r.median_s / 1e9),
                f"{report.floor_fraction(r):.0%}",
                *("-" if ratio is None else f"{ratio:.2f} x" for ratio in ratios),
            )
        )
    rates = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in report.roofs.matmul.items())
    lines = [
        f"prefill of {report.checkpoint} on {report.device}: {processor(report.machine, s['threads'])}, "
        f"multiplies matrices at {rates} GFLOP/s",
        f"one prompt at a time; median of {s['repeats']} repeats; vs: against transformers in that dtype",
        "",
        *aligned(table, right=(0, *range(3, 9))),
    ]
    return "\n".join(lines)


def prefill_json(report: PrefillReport) -> dict[str, Any]:
    """All settings and results as JSON values."""
    return {
        "benchmark": "prefill",
        "date": report.date,
        "checkpoint": report.checkpoint,
        "peer": report.peer,
        "device": report.device,
        "machine": report.machine,
        "versions": report.versions,
        "settings": report.settings,
        "roofs": report.roofs.to_json(),
        "results": [
            {
                **asdict(r),
                "median_s": r.median_s,
                "tokens_per_s": r.tokens_per_s,
                "gflop_per_s": r.flops / r.median_s / 1e9,
                "floor_fraction": report.floor_fraction(r),
                "speedup_over_transformers_fp32": report.speedup(r, "float32"),
                "speedup_over_transformers_bf16": report.speedup(r, "bfloat16"),
            }
            for r in report.results
        ],
    }
