"""The choice for one module: kind, rank and store."""

from __future__ import annotations

from dataclasses import dataclass

from cai_runtime.compressor.factor.mpo import Reshape
from cai_runtime.slim.spec import Kind, ModuleSpec


@dataclass(frozen=True)
class Choice:
    """Kind, rank and store of a module.

    rank: of an mpo the largest bond dimension; None: dense. store: of all cores. reshape: the sites of an mpo, else None.
    """

    kind: Kind
    rank: int | None
    store: str
    reshape: Reshape | None = None

    def spec(self, out_features: int, in_features: int) -> ModuleSpec:
        """The spec of a module of this shape. Raises CheckpointError when the rank does not fit the shape."""
        if self.rank is None:
            return ModuleSpec("dense", out_features, in_features, None, (self.store,))
        if self.reshape is not None:
            return self.reshape.spec(self.rank, self.store)
        return ModuleSpec(self.kind, out_features, in_features, self.rank, (self.store, self.store))
