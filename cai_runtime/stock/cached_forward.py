"""One forward pass of a stock transformers model with its own KV cache, in any supported version.

transformers 5.24 renamed the argument and the output `past_key_values` to `cache`. The old name warns, and 5.40 drops it.
"""

from __future__ import annotations

import inspect
from typing import Any

NAMES = ("cache", "past_key_values")  # newest first


def cache_name(model: Any) -> str | None:
    """The name of `model.forward`'s cache argument; None if it has none."""
    taken = inspect.signature(model.forward).parameters
    return next((name for name in NAMES if name in taken), None)


def cached_forward(model: Any, cache: Any, **inputs: Any) -> tuple[Any, Any]:
    """Run the model on `inputs` after the tokens in `cache` (None: an empty one). Returns (output, updated cache).

    Raises TypeError for a model without a KV cache.
    """
    name = cache_name(model)
    if name is None:
        raise TypeError(f"{type(model).__name__} takes no KV cache")
    output = model(**inputs, **{name: cache}, use_cache=True)
    return output, getattr(output, name)
