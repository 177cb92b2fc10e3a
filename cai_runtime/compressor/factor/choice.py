"""What a module becomes: kind, rank and store."""

from __future__ import annotations

from dataclasses import dataclass

from cai_runtime.compressor.factor.mpo import Reshape
from cai_runtime.slim.spec import Kind, ModuleSpec


@dataclass(frozen=True)
class Choice:
    """Kind, rank (None: dense; of an mpo the widest bond dimension) and store of a module's cores. reshape: of an mpo."""

    kind: Kind
    rank: int | None
    store: str
    reshape: Reshape | None = None

    def spec(self, out_features: int, in_features: int) -> ModuleSpec:
        if self.rank is None:
            return ModuleSpec("dense", out_features, in_features, None, (self.store,))
        if self.reshape is not None:
            return self.reshape.spec(self.rank, self.store)
        return ModuleSpec(self.kind, out_features, in_features, self.rank, (self.store, self.store))
