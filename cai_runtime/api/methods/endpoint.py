"""What the branches of the method tree share."""

from __future__ import annotations

from cai_runtime.api.host import ModelHost


class Methods:
    """A branch: its methods, over one client's models.

    Args:
        host: the client's models.
        timeout: seconds, of requests that name none.
    """

    def __init__(self, host: ModelHost, timeout: float | None = None):
        self._host = host
        self._timeout = timeout
