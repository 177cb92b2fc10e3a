"""What slim_report.json says of how a checkpoint came about, read with no trust in its shape.

Reports are written by other versions and other tools: what is known is shown in words, other plain values as they are,
and what is of an unexpected type is left out. Nothing here raises for a report's content.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cai_runtime.scalars import as_number

# Shown by their own lines, or in the table; anything else that is a plain value goes to the end.
_KNOWN = {
    "source", "source_sha256", "options", "calibration", "versions", "seconds", "modules", "keep", "quality", "created",
    "date", "time", "seed", "elastic", "dense_parameters", "parameters", "dense_bytes", "bytes", "total_dense_parameters",
    "total_parameters", "total_dense_bytes", "total_bytes", "machine", "device",
}  # fmt: skip


@dataclass(frozen=True)
class ModuleErrors:
    """Relative errors by module name: squared error of the outputs over their square, in the calibration's metric."""

    by_name: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, report: Mapping[str, Any] | None) -> ModuleErrors:
        """From a report's `modules`, each an object with `name` and `relative_error`; what is otherwise is passed
        over."""
        modules = (report or {}).get("modules")
        entries = modules if isinstance(modules, list) else []
        found = {}
        for entry in entries:
            if isinstance(entry, dict) and isinstance(entry.get("name"), str):
                error = number(entry.get("relative_error"))
                if error is not None and error >= 0:
                    found[entry["name"]] = error
        return cls(found)


def provenance_lines(report: Mapping[str, Any]) -> list[str]:
    """`what: value` lines for people, of everything in the report that can be told in one."""
    pairs: list[tuple[str, str]] = []

    def add(what: str, value: str | None) -> None:
        if value:
            pairs.append((what, value))

    add("source", _text(report.get("source")))
    add("weights", _hashes(report.get("source_sha256")))
    add("calibration", _calibration(report.get("calibration")))
    add("options", _flat(report.get("options")))
    if not isinstance(report.get("options"), dict) or "seed" not in report["options"]:
        add("seed", _text(report.get("seed")))
    for key in ("created", "date", "time"):
        add("made", _text(report.get(key)))
    add("versions", _flat(report.get("versions"), joint=" "))
    add("machine", _text(report.get("machine")) or _flat(report.get("machine")))
    add("device", _text(report.get("device")))
    add("seconds", _seconds(report.get("seconds")))
    add("keep", _flat(report.get("keep")))
    for key, value in report.items():
        if key not in _KNOWN:
            add(str(key), _text(value))
    lines = [f"{what}: {value}" for what, value in pairs]
    quality = report.get("quality")
    if isinstance(quality, dict):
        lines += quality_lines(quality)
    lines += _elastic_lines(report.get("elastic"))
    return lines


def quality_lines(quality: Mapping[str, Any]) -> list[str]:
    """The lines of a report's `quality` (see `compress.comparison.quality`); those of its parts that are there."""
    lines = []
    before = number(_at(quality, "reference", "perplexity"))
    after = number(_at(quality, "candidate", "perplexity"))
    ratio, ratio_error = (number(_at(quality, "divergence", key)) for key in ("ratio", "ratio_error"))
    if after is not None:
        text = f"perplexity: {after:.2f}" if before is None else f"perplexity: {before:.2f} -> {after:.2f}"
        if ratio is not None:
            text += f", {ratio:.4f} x" + (f" \u00b1 {ratio_error:.4f}" if ratio_error is not None else "")
        lines.append(text)
    kl, kl_error = (number(_at(quality, "divergence", key)) for key in ("kl", "kl_error"))
    if kl is not None:
        lines.append(f"KL: {kl:.4f} nats per token" + (f" \u00b1 {kl_error:.4f}" if kl_error is not None else ""))
    top1 = number(_at(quality, "divergence", "top1"))
    if top1 is not None:
        lines.append(f"top-1 agreement: {top1:.2%}")
    said, heard = (number(_at(quality, model, "word_error")) for model in ("reference", "candidate"))
    if heard is not None:
        words = number(_at(quality, "candidate", "words"))
        text = f"word error rate: {heard:.2%}" if said is None else f"word error rate: {said:.2%} -> {heard:.2%}"
        lines.append(text + (f" of {words:,.0f} words" if words is not None else ""))
    clips, seconds = (number(_at(quality, "audio", key)) for key in ("clips", "seconds"))
    if clips is not None and seconds is not None and lines:
        lines.append(f"judged on: {clips:.0f} clips, {seconds / 60:.1f} minutes of audio")
    source, tokens = _text(_at(quality, "text", "source")), number(_at(quality, "text", "tokens"))
    if source and lines:
        lines.append(f"judged on: {source}" + (f", {tokens:,.0f} tokens" if tokens is not None else ""))
    return lines


def number(value: object) -> float | None:
    """A finite number as a float; None of anything else (a bool, too)."""
    found = as_number(value)
    return None if found is None else float(found)


def stage_seconds(report: Mapping[str, Any] | None) -> dict[str, float]:
    """Wall time by stage, in the report's order; empty where it says nothing usable."""
    seconds = (report or {}).get("seconds")
    if not isinstance(seconds, dict):
        return {}
    return {str(k): v for k, value in seconds.items() if (v := number(value)) is not None and v >= 0}


def _at(value: Mapping[str, Any], *keys: str) -> object:
    found: object = value
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def _text(value: object) -> str | None:
    if isinstance(value, bool) or value is None:
        return None if value is None else str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (str, int)):
        return " ".join(str(value).split())[:200]
    return None


def _flat(value: object, joint: str = " = ") -> str | None:
    if not isinstance(value, dict):
        return None
    parts = [f"{key}{joint}{text}" for key, part in value.items() if (text := _text(part)) is not None]
    return ", ".join(parts)


def _hashes(value: object) -> str | None:
    if isinstance(value, str):
        return f"sha256 {value[:16]}"
    if not isinstance(value, dict):
        return None
    known = [(str(name), text) for name, part in value.items() if isinstance(part, str) and (text := part[:16])]
    shown = ", ".join(f"{name} sha256 {text}" for name, text in known[:2])
    return shown + (f" and {len(known) - 2} more" if len(known) > 2 else "")


def _calibration(value: object) -> str | None:
    if not isinstance(value, dict):
        return _text(value)
    source, tokens, sequences = (_text(value.get(key)) for key in ("source", "tokens", "sequences"))
    size = f"{tokens} tokens" + (f" in {sequences} sequences" if sequences else "") if tokens else None
    rest = {key: part for key, part in value.items() if key not in ("source", "tokens", "sequences")}
    return ", ".join(part for part in (source, size, _flat(rest)) if part)


def _seconds(value: object) -> str | None:
    stages = stage_seconds({"seconds": value})
    if not stages:
        return None
    total = f"{sum(stages.values()):.0f} in all: " if len(stages) > 1 and "total" not in stages else ""
    return total + ", ".join(f"{stage} {took:.1f}" for stage, took in stages.items())


def _elastic_lines(value: object) -> list[str]:
    """The quality of an elastic checkpoint by keep, and what its second forms take."""
    if not isinstance(value, dict):
        return []
    found = _flat(value.get("second_forms"))
    table = quality_table(value.get("quality"), indent=2)
    return [*([f"second forms: {found}"] if found else []), *(["quality by keep:", *table] if table else [])]


def quality_table(entries: object, indent: int = 0) -> list[str]:
    """Aligned lines, a header first, of a list of numbers by name with a "keep" in each; nothing of anything else."""
    rows = (
        [e for e in entries if isinstance(e, dict) and number(e.get("keep")) is not None]
        if isinstance(entries, list)
        else []
    )
    names = dict.fromkeys(name for row in rows for name, value in row.items() if number(value) is not None)
    cells = [[str(name) for name in names]]
    for row in rows:
        values = [number(row.get(name)) for name in names]
        cells.append(["" if v is None else f"{v:,.0f}" if v.is_integer() and v > 9 else f"{v:.4g}" for v in values])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [" " * indent + "  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in cells]
    return [line.rstrip() for line in lines] if rows else []
