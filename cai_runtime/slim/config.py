"""A slim checkpoint's `quantization_config`, parsed strictly. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cai_runtime.errors import InvalidConfigError, UnknownVersionError
from cai_runtime.slim.elastic import ElasticTable
from cai_runtime.slim.spec import ModuleSpec

FORMAT_VERSION = 1
QUANT_METHOD = "cai"


@dataclass(frozen=True)
class SlimConfig:
    """The `quantization_config` of a slim checkpoint: format version, the modules it lists, by full name, and the table of
    an elastic one."""

    modules: dict[str, ModuleSpec] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    elastic: ElasticTable | None = None

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "quant_method": QUANT_METHOD,
            "format_version": self.format_version,
            "modules": {name: spec.to_json() for name, spec in self.modules.items()},
        }
        return found if self.elastic is None else {**found, "elastic": self.elastic.to_json()}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], file: str | Path | None = None) -> SlimConfig | None:
        """Read it out of a parsed config.json; None when the checkpoint is a plain dense one.

        Raises:
            UnknownVersionError: `format_version` is not `FORMAT_VERSION`, or the elastic table's is not this version's.
            InvalidConfigError: another quantization method, an unknown or missing key, or a malformed entry.
            UnknownKindError, UnknownStoreError: see `ModuleSpec.from_json`.
        """
        raw = config.get("quantization_config")
        if raw is None:
            return None
        if not isinstance(raw, dict):
            raise InvalidConfigError("quantization_config must be an object", file=file)
        method = raw.get("quant_method")
        if method != QUANT_METHOD:
            raise InvalidConfigError(
                f"quantization_config: quant_method is {method!r}; only {QUANT_METHOD!r} and unquantized checkpoints "
                "can be read, so start from the model's unquantized weights",
                file=file,
            )
        # Before the keys: a newer version may well have other ones, and its number is what the user needs to hear.
        if "format_version" not in raw:
            raise InvalidConfigError("quantization_config has no 'format_version'", file=file)
        version = raw["format_version"]
        if type(version) is not int or version != FORMAT_VERSION:
            raise UnknownVersionError(
                f"slim format_version {version!r} is unknown; this version of cai_runtime reads {FORMAT_VERSION}; "
                "upgrade it, or compress the model again",
                file=file,
            )
        unknown = sorted(set(raw) - {"quant_method", "format_version", "modules", "elastic"})
        if unknown:
            raise InvalidConfigError(f"quantization_config has unknown keys {unknown}", file=file)
        modules = raw.get("modules")
        if not isinstance(modules, dict):
            raise InvalidConfigError("quantization_config needs 'modules', an object from name to entry", file=file)
        specs = {name: ModuleSpec.from_json(name, entry, file) for name, entry in modules.items()}
        if "elastic" not in raw:
            return cls(specs, version)
        return cls(specs, version, ElasticTable.from_json(raw["elastic"], specs, file))
