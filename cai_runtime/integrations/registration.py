"""Registers the slim format with transformers, now or when transformers is imported. Imports neither torch nor transformers.

transformers keeps its quantization methods in tables of `transformers.quantizers.auto` and reads no entry points, so each
process must call `register_quantizer`. Importing that module takes seconds and imports torch, which `import cai_runtime`
must not do. If it is not loaded yet, a finder at the head of `sys.meta_path` waits for that one name. It removes itself
when the module is imported, and registers after it.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

WATCHED = "transformers.quantizers.auto"
QUANTIZER = "cai_runtime.integrations.quantizer"


def install() -> None:
    """Register with transformers as soon as it can be used: at once if it is loaded. Idempotent; never raises."""
    if WATCHED in sys.modules:
        import_module(WATCHED)  # waits if another thread is importing it
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    """A failure is a warning, so that `import transformers` works for programs without slim checkpoints. A slim checkpoint
    does not load without the registration: see `cai_runtime.slim.writer.GUARD`."""
    quantizer = sys.modules.get(QUANTIZER)
    if quantizer is not None and not hasattr(quantizer, "register"):
        return  # its own import is importing transformers: it registers at its end
    try:
        import_module(QUANTIZER).register()
    except Exception as e:  # noqa: BLE001
        warnings.warn(
            f"cai_runtime can't register its checkpoints with transformers: {e!r}", RuntimeWarning, stacklevel=2
        )


class _Finder(MetaPathFinder):
    """Finds `WATCHED` by the other finders, and wraps its loader so that it registers afterwards. Used once."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != WATCHED:
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Runs the module's own loader, then registers."""

    def __init__(self, loader: Loader):
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader  # as tools that inspect modules expect
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        _register()
