"""Code that is not ours: its errors made typed, its output kept back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cai_runtime.errors import CaiError, CompressionError
from cai_runtime.stock.torch_state import BUILDING


@contextmanager
def as_compression_error(what: str) -> Iterator[None]:
    """Any error within is a CompressionError: `what` can't be done, and why.

    For transformers on a user's files: it raises whatever its code stumbles over (a ZeroDivisionError for no heads, an
    AttributeError for a list where an object belongs), so that no list of exceptions is complete.
    """
    try:
        yield
    except (CaiError, MemoryError):
        raise
    except Exception as e:
        raise CompressionError(f"{what}: {str(e).strip() or type(e).__name__}") from e


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' bars, which come whether stderr is a terminal or not, and without its tables of what is
    missing, which is an error here. One thread at a time."""
    from transformers.utils import logging

    with BUILDING:  # these, too, are of the whole process
        verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()
