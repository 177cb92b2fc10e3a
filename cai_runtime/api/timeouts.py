"""What a request that took too long raises."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from cai_runtime.api.errors import APITimeoutError


def timed_out(seconds: float | None) -> APITimeoutError:
    """The error of a request that was aborted after `seconds`."""
    return APITimeoutError(
        f"The request was aborted after {seconds:.3g} s, its timeout: allow more time, or ask for fewer tokens.",
        code="timeout",
    )


@contextlib.contextmanager
def timing_out(seconds: float | None) -> Iterator[None]:
    """Raise a TimeoutError of the block, which waits at most `seconds`, as an APITimeoutError."""
    try:
        yield
    except TimeoutError:
        if seconds is None:  # not ours: nothing was timed
            raise
        raise timed_out(seconds) from None
