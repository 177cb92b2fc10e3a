"""What a checkpoint holds, module by module, from its headers alone: no weight is read and torch is not loaded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cai_runtime.errors import CheckpointError
from cai_runtime.slim.elastic import ElasticTable
from cai_runtime.slim.generation_defaults import GenerationDefaults
from cai_runtime.slim.provenance import ModuleErrors, provenance_lines, quality_table
from cai_runtime.slim.reader import Checkpoint
from cai_runtime.slim.spec import FLOAT_STORE_OF_DTYPE, ModuleSpec


@dataclass(frozen=True)
class ModuleRow:
    """One linear module. `listed`: whether `quantization_config` lists it, that is, whether it counts in `keep`."""

    name: str
    spec: ModuleSpec
    listed: bool


@dataclass(frozen=True)
class Totals:
    """Sums over modules. Bytes are those of cores, scales and pivots; `dense_nbytes` those of the same modules in
    bf16."""

    modules: int
    parameters: int
    dense_parameters: int
    nbytes: int
    dense_nbytes: int

    @property
    def keep_parameters(self) -> float:
        return self.parameters / self.dense_parameters

    @property
    def keep_bytes(self) -> float:
        return self.nbytes / self.dense_nbytes

    @classmethod
    def of(cls, specs: Iterable[ModuleSpec]) -> Totals | None:
        """The sums, or None of no modules at all."""
        specs = list(specs)
        if not specs:
            return None
        return cls(
            len(specs),
            sum(s.parameters for s in specs),
            sum(s.dense_parameters for s in specs),
            sum(s.nbytes for s in specs),
            sum(s.dense_nbytes for s in specs),
        )


@dataclass(frozen=True)
class Inspection:
    """A checkpoint's contents.

    Attributes:
        format_version: None for a plain dense checkpoint.
        modules: the listed modules in their order, then every other 2-D float `.weight`, embeddings among them.
        kept: totals over the listed modules, the ones `keep` is about; None when none is listed.
        parameters, nbytes: of the whole checkpoint; scales and pivots count as bytes and not as parameters.
        other_tensors, other_parameters, other_nbytes: what belongs to no row of `modules`: norms and biases.
        files: shards.
        report: slim_report.json, if there is one that can be read.
        report_problem: why it can't be, in words.
        elastic: of an elastic checkpoint the least and the greatest keep that it opens at, the one it was opened at,
            and the quality that its table gives.
        sampling_defaults: what requests that name no value of their own get, where it differs from OpenAI's defaults.
        sampling_problem: why generation_config.json can't be used, in words.
    """

    path: Path
    model_type: str | None
    format_version: int | None
    modules: tuple[ModuleRow, ...]
    kept: Totals | None
    parameters: int
    nbytes: int
    other_tensors: int
    other_parameters: int
    other_nbytes: int
    files: tuple[str, ...]
    report: dict[str, Any] | None
    report_problem: str | None = None
    elastic: dict[str, Any] | None = None
    sampling_defaults: dict[str, Any] = field(default_factory=dict)
    sampling_problem: str | None = None

    @property
    def stores(self) -> dict[str, int]:
        """Bytes of the listed modules by store, most first; of modules whose cores differ, under "a+b"."""
        found: dict[str, int] = {}
        for row in self.modules:
            if row.listed:
                store = "+".join(dict.fromkeys(row.spec.store))
                found[store] = found.get(store, 0) + row.spec.nbytes
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def to_json(self) -> dict[str, Any]:
        kept = self.kept
        return {
            "path": str(self.path),
            "model_type": self.model_type,
            "format_version": self.format_version,
            "files": list(self.files),
            "parameters": self.parameters,
            "bytes": self.nbytes,
            "modules": [
                {"name": r.name, "listed": r.listed, **r.spec.to_json(), **_sizes(r.spec)} for r in self.modules
            ],
            "listed": {"modules": kept.modules, **_sizes(kept)} if kept is not None else None,
            "other": {
                "tensors": self.other_tensors,
                "parameters": self.other_parameters,
                "bytes": self.other_nbytes,
            },
            "stores": self.stores,
            "elastic": self.elastic,
            "sampling_defaults": self.sampling_defaults,
            "sampling_problem": self.sampling_problem,
            "report": self.report,
            "report_problem": self.report_problem,
        }


def inspect_checkpoint(path: str | Path, keep: float | None = None) -> Inspection:
    """Inspect a slim or plain dense directory. keep: an elastic one as it is at this keep. Raises what
    `Checkpoint.open` raises; a slim_report.json that can't be read is only noted."""
    with Checkpoint.open(path, keep=keep) as checkpoint:
        tensors = checkpoint.tensors()
        rows = [ModuleRow(name, spec, True) for name, spec in checkpoint.modules.items()]
        covered = {tensor for row in rows for tensor in row.spec.tensors(row.name)}
        for tensor, info in tensors.items():
            module = tensor.removesuffix(".weight")
            two_d = len(info.shape) == 2 and 0 not in info.shape
            if tensor != module and tensor not in covered and two_d and info.dtype in FLOAT_STORE_OF_DTYPE:
                rows.append(ModuleRow(module, checkpoint.spec(module), False))
                covered.add(tensor)
        other = [info for name, info in tensors.items() if name not in covered]
        other_parameters = sum(math.prod(info.shape) for info in other)
        model_type = checkpoint.config.get("model_type")
        report, problem = None, None
        try:
            report = checkpoint.report()
        except CheckpointError as e:  # the weights are as good without it
            problem = str(e)
        defaults, sampling_problem = GenerationDefaults(), None
        try:
            defaults = GenerationDefaults.read(checkpoint.path)
        except CheckpointError as e:
            sampling_problem = str(e)
        return Inspection(
            path=checkpoint.path,
            model_type=model_type if isinstance(model_type, str) else None,
            format_version=checkpoint.format_version,
            modules=tuple(rows),
            kept=Totals.of(row.spec for row in rows if row.listed),
            parameters=sum(row.spec.parameters for row in rows) + other_parameters,
            nbytes=checkpoint.nbytes,
            other_tensors=len(other),
            other_parameters=other_parameters,
            other_nbytes=sum(info.nbytes for info in other),
            files=tuple(sorted({info.file.name for info in tensors.values()})),
            report=report,
            report_problem=problem,
            elastic=None if checkpoint.elastic is None else _elastic(checkpoint, checkpoint.elastic),
            sampling_defaults=defaults.given(),
            sampling_problem=sampling_problem,
        )


def format_inspection(inspection: Inspection, *, every_module: bool = False) -> str:
    """The table that `cai inspect` prints. Modules that differ only in their layer's number, and perhaps in rank,
    share a line with their sums, unless `every_module`."""
    header = ("module", "", "kind", "[out, in]", "rank", "store", "parameters", "keep (par.)", "bytes", "keep (bytes)")
    errors = ModuleErrors.of(inspection.report).by_name
    table: list[Sequence[str]] = [(*header, "error")]
    for rows in _groups(inspection.modules, every_module):
        spec, totals = rows[0].spec, Totals.of(row.spec for row in rows)
        assert totals is not None
        name = rows[0].name if len(rows) == 1 else _pattern(rows[0].name)
        count = f"x{len(rows)}" if len(rows) > 1 else ""
        keep = (f"{totals.keep_parameters:.3f}", f"{totals.keep_bytes:.3f}") if rows[0].listed else ("", "")
        rank = _rank_range([row.spec.rank for row in rows])
        numbers = (_count(totals.parameters), keep[0], _bytes(totals.nbytes), keep[1])
        shape = f"[{spec.out_features}, {spec.in_features}]"
        error = _error_range([errors[row.name] for row in rows if row.name in errors])
        table.append((name, count, spec.kind, shape, rank, "+".join(spec.store), *numbers, error))
    if inspection.other_tensors:
        count, parameters = f"x{inspection.other_tensors}", _count(inspection.other_parameters)
        table.append(
            ("(other tensors)", count, "", "", "", "", parameters, "", _bytes(inspection.other_nbytes), "", "")
        )
    kept = inspection.kept
    if kept is not None:
        sums = (_count(kept.parameters), f"{kept.keep_parameters:.3f}", _bytes(kept.nbytes), f"{kept.keep_bytes:.3f}")
        table.append(("listed modules", f"x{kept.modules}", "", "", "", "", *sums, ""))
    table.append(
        ("checkpoint", "", "", "", "", "", _count(inspection.parameters), "", _bytes(inspection.nbytes), "", "")
    )
    version = inspection.format_version
    kind = "plain dense checkpoint" if version is None else f"slim checkpoint, format version {version}"
    lines = [
        f"{inspection.path}: {kind}, {inspection.model_type or 'no model_type'}, {len(inspection.files)} shard(s)",
        "",
    ]
    lines += _aligned(table)
    if kept is not None:
        lines += ["", "keep: stored over dense; for bytes, dense in bf16."]
    if any(row[-1] for row in table[1:]):
        lines += [
            "error: squared error of the outputs over their square, as the report gives it; of several, the range."
        ]
    if len(inspection.stores) > 1 and kept is not None:
        shares = ", ".join(f"{store} {nbytes / kept.nbytes:.1%}" for store, nbytes in inspection.stores.items())
        lines += ["", f"stores of the listed modules, by bytes: {shares}"]
    if inspection.elastic is not None:
        lines += ["", *_elastic_lines(inspection.elastic)]
    if inspection.sampling_defaults:
        shown = ", ".join(f"{name} {value:g}" for name, value in inspection.sampling_defaults.items())
        lines += ["", f"sampling defaults: {shown} (generation_config.json)"]
    if inspection.sampling_problem is not None:
        lines += ["", f"sampling defaults: {inspection.sampling_problem}"]
    if inspection.report_problem is not None:
        lines += ["", f"report: {inspection.report_problem}"]
    report = dict(inspection.report or {})
    if inspection.elastic is not None and inspection.elastic["quality"] and isinstance(report.get("elastic"), dict):
        report["elastic"] = {**report["elastic"], "quality": None}  # the table above is the same
    told = provenance_lines(report)
    if told:
        lines += ["", "report:", *(f"  {line}" for line in told)]
    return "\n".join(lines)


def _sizes(part: ModuleSpec | Totals) -> dict[str, int | float]:
    return {
        "parameters": part.parameters,
        "dense_parameters": part.dense_parameters,
        "keep_parameters": part.keep_parameters,
        "bytes": part.nbytes,
        "dense_bf16_bytes": part.dense_nbytes,
        "keep_bytes": part.keep_bytes,
    }


def _pattern(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _groups(rows: Iterable[ModuleRow], every_module: bool) -> list[list[ModuleRow]]:
    groups: dict[object, list[ModuleRow]] = {}
    for row in rows:
        spec = row.spec
        alike = (_pattern(row.name), row.listed, spec.kind, spec.out_features, spec.in_features, spec.store)
        groups.setdefault(row.name if every_module else alike, []).append(row)
    return list(groups.values())


def _rank_range(ranks: Sequence[int | tuple[int, ...] | None]) -> str:
    known = sorted({rank if isinstance(rank, tuple) else (rank,) for rank in ranks if rank is not None})
    texts = [",".join(map(str, rank)) for rank in known]
    return "" if not texts else texts[0] if len(texts) == 1 else f"{texts[0]}..{texts[-1]}"


def _elastic(checkpoint: Checkpoint, table: ElasticTable) -> dict[str, Any]:
    least, greatest = table.keep
    return {"least": least, "greatest": greatest, "opened_at": checkpoint.keep, "quality": list(table.quality)}


def _elastic_lines(elastic: dict[str, Any]) -> list[str]:
    at = f"; shown at {elastic['opened_at']:.4f}" if elastic["opened_at"] is not None else ""
    lines = [f"elastic: opens at any keep from {elastic['least']:.4f} to {elastic['greatest']:.4f}{at}"]
    return lines + quality_table(elastic["quality"], indent=2)


def _error_range(errors: Sequence[float]) -> str:
    if not errors:
        return ""
    low, high = f"{min(errors):.2g}", f"{max(errors):.2g}"
    return low if low == high else f"{low}..{high}"


def _count(number: int) -> str:
    return f"{number:,}"


def _bytes(number: int) -> str:
    return f"{number / 1e6:,.2f} MB" if number >= 10_000 else f"{number:,} B"


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    left = 6  # the first columns are words, the others numbers
    columns = [column for column in range(len(table[0])) if any(row[column] for row in table[1:])]
    widths = {column: max(len(row[column]) for row in table) for column in columns}
    return [
        "  ".join(row[c].ljust(widths[c]) if c < left else row[c].rjust(widths[c]) for c in columns).rstrip()
        for row in table
    ]
