"""Guards around transformers: its errors become typed errors, its logs and bars are silenced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cai_runtime.errors import CaiError, CompressionError
from cai_runtime.stock.torch_state import BUILDING


@contextmanager
def as_compression_error(what: str) -> Iterator[None]:
    """Turn any exception inside into a CompressionError that begins with `what`. CaiError and MemoryError pass.

    On a user's damaged files transformers raises exceptions of any type: a ZeroDivisionError for zero heads, an
    AttributeError for a list in place of an object. No list of types would be complete.
    """
    try:
        yield
    except (CaiError, MemoryError):
        raise
    except Exception as e:
        raise CompressionError(f"{what}: {str(e).strip() or type(e).__name__}") from e


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars, which ignore whether stderr is a terminal, and its tables of missing tensors,
    which our errors replace. One thread at a time, because these settings are of the whole process."""
    from transformers.utils import logging

    with BUILDING:
        verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()
