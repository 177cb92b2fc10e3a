"""Maps names of a checkpoint's tensors to names in transformers' model: transformers renames and fuses some at load."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Names:
    """The names in one model, whose weights may be on the meta device."""

    def __init__(self, model: Any):
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        found = get_model_conversion_mapping(model)
        self._renamings = [t for t in found if isinstance(t, WeightRenaming)]
        self._converters = [t for t in found if not isinstance(t, WeightRenaming)]
        # Names in a checkpoint of the base model alone ("layers.0...") lack the prefix that the whole model gives them
        # ("model.layers.0..."). Loading the base model from a checkpoint of the whole one needs it taken off.
        self._prefix = f"{model.base_model_prefix}." if model.base_model_prefix else None
        self._own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self._own |= {name for name, _ in model.named_buffers(remove_duplicate=False)}

    def in_model(self, name: str) -> str | None:
        """The name of a stock tensor in the model; None if transformers converts it (fuses or permutes). For a tensor that
        the model does not have, the name that transformers would look for."""
        renamed = self._renamed(name)
        if renamed is None or self._prefix is None or renamed in self._own:
            return renamed
        for other in (renamed.removeprefix(self._prefix), self._prefix + renamed):
            if other in self._own:
                return other
        return renamed

    def module_in_model(self, name: str, parts: Sequence[str]) -> str | None:
        """The name of a linear module or an embedding in the model. None if transformers converts its weight, or renames its
        cores in another way than the weight. parts: names of the cores' tensors, without the module's."""
        weight, found = self._renamed(f"{name}.weight"), self.in_model(f"{name}.weight")
        if weight is None or found is None:
            return None
        stem = weight.removesuffix(".weight")
        alike = all(self._renamed(f"{name}.{part}") == f"{stem}.{part}" for part in parts)
        return found.removesuffix(".weight") if alike else None

    def _renamed(self, name: str) -> str | None:
        for renaming in self._renamings:
            name = renaming.rename_source_key(name)[0]
        converted = any(converter.rename_source_key(name)[1] is not None for converter in self._converters)
        return None if converted else name
