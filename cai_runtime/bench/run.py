"""Runs the decode benchmark: bandwidth, our engine, optional peers, bandwidth again; one process at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cai_runtime.bench.checks import Peers, check_at_least, check_peers
from cai_runtime.bench.child import run_child
from cai_runtime.bench.decode import DecodeResult, DecodeSettings, kv_elements
from cai_runtime.bench.machine import describe_machine, usable_threads, versions


@dataclass(frozen=True)
class DecodeReport:
    """All results of a run. bandwidth: bytes per second, the higher of two measurements at its start and its end."""

    checkpoint: str
    peers: dict[str, str]
    device: str
    date: str
    machine: dict[str, Any]
    versions: dict[str, str | None]
    settings: dict[str, Any]
    bandwidth: float
    results: list[DecodeResult]


def bench_decode(
    checkpoint: str | Path,
    *,
    batches: Sequence[int] = (1, 8, 32),
    tokens: int = 64,
    prompt_tokens: int = 64,
    repeats: int = 3,
    threads: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    peers: Peers | None = None,
    progress: bool | None = None,
) -> DecodeReport:
    """Measure the decode speed of a checkpoint directory, as `decode.py` describes.

    Args:
        batches: numbers of sequences.
        tokens: of each answer, at least 2.
        prompt_tokens: of each prompt.
        repeats: the figures are medians over these.
        threads: of the CPU; default: all that this process may use.
        device, dtype: as `EngineOptions` takes them.
        peers: also measure llama.cpp at every batch size, on the CPU only, and transformers in fp32 and bf16 at batch 1,
            because it has no continuous batching.
        progress: a progress bar on stderr; None shows it on a terminal only.

    Raises:
        BenchmarkError: an argument is out of range, a measurement failed, or the peers' model is another one.
        CheckpointError: the checkpoint can't be read.
    """
    from cai_runtime.progress import progress_bar
    from cai_runtime.slim.reader import Checkpoint

    path = Path(checkpoint).expanduser().absolute()
    threads = usable_threads() if threads is None else threads
    check_at_least(2, tokens=tokens)
    check_at_least(1, batch=min(batches, default=0), prompt_tokens=prompt_tokens, repeats=repeats, threads=threads)
    with Checkpoint.open(path) as opened:
        config = opened.config
    if peers is not None:
        check_peers(config, peers)
    base = DecodeSettings(
        batch=1,
        tokens=tokens,
        prompt_tokens=prompt_tokens,
        repeats=repeats,
        threads=threads,
        vocab_size=int(config["vocab_size"]),
        kv_elements=kv_elements(config),
        dtype=dtype,
    )
    with progress_bar("measure", total=None, unit="run", show=progress) as bar:

        def child(label: str, job: dict[str, Any]) -> Any:
            bar.set_postfix_str(label)
            result = run_child(job, threads=threads)
            bar.update()
            return result

        before = child("bandwidth", {"do": "roofs.bandwidth", "device": device})
        base = replace(base, device=before["device"])
        planned = list(subjects(path, base, batches, peers))
        bar.total = len(planned) + 2
        results = []
        for subject, where, settings in planned:
            job = {"do": "subjects.decode", "subject": subject, "path": str(where), "settings": asdict(settings)}
            results.append(DecodeResult(**child(f"{subject}, batch {settings.batch}", job)))
        after = child("bandwidth", {"do": "roofs.bandwidth", "device": device})
    shared = {key: value for key, value in asdict(base).items() if key not in ("batch", "device")}
    return DecodeReport(
        checkpoint=path.name,
        peers={} if peers is None else {"gguf": peers.gguf.name, "dense": peers.dense.name},
        device=base.device,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        machine={**describe_machine(), "gpu": before["gpu"]},
        versions=versions(),
        settings={**shared, "batches": list(batches)},
        bandwidth=max(before["bytes_per_s"], after["bytes_per_s"]),
        results=results,
    )


def subjects(
    path: Path, base: DecodeSettings, batches: Sequence[int], peers: Peers | None
) -> Iterator[tuple[str, Path, DecodeSettings]]:
    """The measurements in order. Ours and llama.cpp take turns at each batch size, so that a change of the machine's speed
    affects both."""
    for batch in batches:
        yield "cai_runtime", path, replace(base, batch=batch)
        if peers is not None and base.device == "cpu":
            yield "llama.cpp", peers.gguf, replace(base, batch=batch)
    if peers is not None:
        for dtype in ("float32", "bfloat16"):
            yield "transformers", peers.dense, replace(base, batch=1, dtype=dtype)
