"""The report of a compression, written beside the weights as slim_report.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from cai_runtime.compressor.stats.uncompressed import Left
from cai_runtime.slim.provenance import quality_table
from cai_runtime.slim.spec import DENSE_REFERENCE_BYTES


@dataclass(frozen=True)
class ModuleReport:
    """One compressed module.

    rank: None: dense; a list: the bond dimensions of an mpo. relative_error: squared error of the decomposition in the
    whitened metric over that of W = 0, before rounding, refinement and healing.
    """

    name: str
    kind: str
    rank: int | list[int] | None
    store: list[str]
    out_features: int
    in_features: int
    parameters: int
    nbytes: int
    dense_bytes: int
    relative_error: float
    calibrated: bool  # whether the module had inputs in the calibration; one without (an expert) tends to stay dense
    out_dims: list[int] | None = None  # sites of an mpo; in_dims, too
    in_dims: list[int] | None = None


@dataclass
class Report:
    """The report of one compression. Byte counts are of the files; "dense" byte counts are two bytes (bf16) per parameter.

    dense_parameters, parameters, dense_bytes, bytes: of the compressed modules; with total_: of the whole checkpoint. ends:
    stores of embedding and head, by name. seconds: wall time by stage over all calls. blocks: error of each block before and
    after refinement, see `refine_block`. healing: mean divergence of each step, in nats per position. quality: see
    `cai_runtime.compare`. left: parameters of matrices that stay uncompressed, by reason (see `uncompressed.Left`). read:
    names of layers that stay dense because the model reads their weights without calling them.

    elastic: of an elastic checkpoint: "keep": smallest and largest; "second_forms": count, parameters and bytes of the
    lowrank forms of modules that are dense at the largest keep; "quality": at several keeps, falling. All other fields are
    for the largest keep, without second forms.
    """

    source: str
    source_sha256: dict[str, str]
    options: dict[str, Any]
    calibration: dict[str, Any]
    versions: dict[str, str]
    ends: dict[str, str] = field(default_factory=dict)
    modules: list[ModuleReport] = field(default_factory=list)
    dense_parameters: int = 0
    parameters: int = 0
    dense_bytes: int = 0
    bytes: int = 0
    total_dense_parameters: int = 0
    total_parameters: int = 0
    total_dense_bytes: int = 0
    total_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    blocks: list[dict[str, Any]] = field(default_factory=list)
    healing: list[float] = field(default_factory=list)
    quality: dict[str, Any] | None = None
    elastic: dict[str, Any] | None = None
    left: dict[str, int] = field(default_factory=dict)
    read: list[str] = field(default_factory=list)

    @classmethod
    def of_json(cls, found: dict[str, Any]) -> Report:
        """The inverse of `to_json`."""
        known = {field.name: found[field.name] for field in fields(cls)}
        return cls(**{**known, "modules": [ModuleReport(**module) for module in found["modules"]]})

    def add(self, dense_parameters: int, parameters: int, nbytes: int) -> None:
        """Count a compressed module."""
        self.dense_parameters += dense_parameters
        self.parameters += parameters
        self.dense_bytes += dense_parameters * DENSE_REFERENCE_BYTES
        self.bytes += nbytes
        self.total_dense_parameters += dense_parameters
        self.total_parameters += parameters
        self.total_dense_bytes += dense_parameters * DENSE_REFERENCE_BYTES
        self.total_bytes += nbytes

    def add_rest(self, parameters: int, nbytes: int) -> None:
        """Count a tensor outside the compressed modules."""
        self.total_dense_parameters += parameters
        self.total_parameters += parameters
        self.total_dense_bytes += parameters * DENSE_REFERENCE_BYTES
        self.total_bytes += nbytes

    @property
    def keep_parameters(self) -> float:
        """Stored parameters of the factorized modules over their dense count."""
        return self.parameters / self.dense_parameters

    @property
    def keep_bytes(self) -> float:
        """Stored bytes of the factorized modules over their bytes in bf16."""
        return self.bytes / self.dense_bytes

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values, and the keep in parameters and bytes."""
        return {"keep": {"parameters": self.keep_parameters, "bytes": self.keep_bytes}, **asdict(self)}

    def summary(self) -> str:
        """The summary as a few lines of text."""
        dense = sum(m.rank is None for m in self.modules)
        unreached = sum(not m.calibrated for m in self.modules)
        lines = [
            f"{len(self.modules)} linear layers, {dense} of them left dense"
            + (f", {unreached} not reached by the calibration text" if unreached else ""),
            f"their parameters  {self.dense_parameters:>14,} -> {self.parameters:>14,}   "
            f"keep {self.keep_parameters:.3f}",
            f"their bytes       {self.dense_bytes:>14,} -> {self.bytes:>14,}   keep {self.keep_bytes:.3f} of bf16",
            *Left(self.left, self.total_dense_parameters).lines(),
            f"whole checkpoint  {self.total_dense_bytes:>14,} -> {self.total_bytes:>14,} bytes, "
            f"{self.total_bytes / self.total_dense_bytes:.3f} of bf16",
            *self._elastic_lines(),
            "seconds           " + ", ".join(f"{stage} {took:.1f}" for stage, took in self.seconds.items()),
        ]
        return "\n".join(lines)

    def _elastic_lines(self) -> list[str]:
        if self.elastic is None:
            return []
        least, most = self.elastic["keep"]
        nbytes = self.total_bytes + self.elastic["second_forms"]["bytes"]
        lines = [f"elastic           opens at keep {least:g} to {most:g}; the file has {nbytes:,} bytes"]
        return lines + quality_table(self.elastic["quality"], indent=18)
