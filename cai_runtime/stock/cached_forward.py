"""One step of a stock transformers model over its own KV cache, by whichever name its version gives the cache.

transformers 5.24 renamed the argument and the output `past_key_values` to `cache`; the old name warns and goes with 5.40.
"""

from __future__ import annotations

import inspect
from typing import Any

NAMES = ("cache", "past_key_values")  # newest first


def cache_name(model: Any) -> str | None:
    """What `model.forward` calls its cache; None where it takes none."""
    taken = inspect.signature(model.forward).parameters
    return next((name for name in NAMES if name in taken), None)


def cached_forward(model: Any, cache: Any, **inputs: Any) -> tuple[Any, Any]:
    """The model's output for `inputs` behind what `cache` holds (None: nothing yet), and the cache with them in it."""
    name = cache_name(model)
    if name is None:
        raise TypeError(f"{type(model).__name__} takes no KV cache")
    output = model(**inputs, **{name: cache}, use_cache=True)
    return output, getattr(output, name)
