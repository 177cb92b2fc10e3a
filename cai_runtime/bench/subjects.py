"""The engines that `cai bench decode` and `prefill` measure, by name, and the jobs of their child processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cai_runtime.bench.decode import DecodeSettings, OurEngine, Subject, measure
from cai_runtime.bench.peers import LlamaCpp, Transformers

SUBJECTS: dict[str, Callable[[Path, DecodeSettings], Subject]] = {
    "cai_runtime": OurEngine,
    "llama.cpp": LlamaCpp,
    "transformers": Transformers,
}


def decode(job: dict[str, Any]) -> dict[str, Any]:
    """The fields of a `DecodeResult`. job: "subject", "path" and "settings", the fields of `DecodeSettings`."""
    with _opened(job) as (subject, settings):
        return asdict(measure(subject, settings))


def prefill(job: dict[str, Any]) -> dict[str, Any]:
    """The fields of a `PrefillResult` except linear_parameters. job: as for `decode`."""
    with _opened(job) as (subject, settings):
        return measure_prefill(subject, settings)


def measure_prefill(subject: Subject, settings: DecodeSettings) -> dict[str, Any]:
    """Warm up with one prompt of the measured length, then time `repeats` others. Returns as `prefill`."""
    subject.generate(settings.prompts(0), 1)
    seconds = [max(subject.generate(settings.prompts(run + 1), 1)) for run in range(settings.repeats)]
    return {
        "engine": subject.engine,
        "weights": subject.weights,
        "prompt_tokens": settings.prompt_tokens,
        "seconds": seconds,
        "versions": subject.versions,
    }


@contextmanager
def _opened(job: dict[str, Any]) -> Iterator[tuple[Subject, DecodeSettings]]:
    settings = DecodeSettings(**job["settings"])
    subject = SUBJECTS[job["subject"]](Path(job["path"]), settings)
    try:
        yield subject, settings
    finally:
        subject.close()
