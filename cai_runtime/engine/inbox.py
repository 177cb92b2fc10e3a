"""From any thread to the engine's thread: commands, and the count of the requests that the engine still has to finish."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from cai_runtime.errors import CaiError, EngineClosedError, InvalidRequestError, QueueFullError


class Inbox:
    """Commands for the engine's thread, which calls them between two steps.

    max_batch: requests that run at once. max_waiting: requests that may wait beside them; None: any number.
    """

    def __init__(self, *, max_batch: int, max_waiting: int | None):
        # SimpleQueue.put is reentrant: finalizers put here, in whatever thread the garbage collector runs. None: stop.
        self.queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.closed = False
        self.crash: BaseException | None = None  # an error of the engine itself, which ended it
        self._gate = threading.Lock()  # guards `closed` and `_unfinished`
        self._unfinished = 0  # requests that were sent and have not ended
        self._max_batch = max_batch
        self._most = None if max_waiting is None else max_batch + max_waiting

    def send(self, command: Callable[[], None], *, requests: int = 0) -> None:
        """Have the engine's thread call `command`. requests: how many it adds, all or none.

        Raises EngineClosedError; QueueFullError; InvalidRequestError for more requests than could ever run and wait."""
        most = self._most
        with self._gate:
            if self.closed:
                raise self.closed_error()
            if requests and most is not None:
                if requests > most:
                    raise InvalidRequestError(
                        f"{requests} sequences at once never fit max_batch {self._max_batch} and max_waiting "
                        f"{most - self._max_batch}: ask for fewer, or raise one of them"
                    )
                if self._unfinished + requests > most:
                    raise QueueFullError(
                        f"{self._unfinished} requests run or wait already, and {most} may: try again later, or raise "
                        "max_waiting"
                    )
            self._unfinished += requests
            self.queue.put(command)

    def stop(self) -> None:
        """Have the engine's thread end, after the commands that were sent before."""
        self.queue.put(None)

    def close(self) -> None:
        """From now on `send` raises EngineClosedError."""
        with self._gate:
            self.closed = True

    def end_request(self) -> None:
        """Make room for another request. By the engine's thread."""
        with self._gate:
            self._unfinished -= 1

    def closed_error(self) -> EngineClosedError:
        """The error for callers of a closed engine, which names the crash that closed it."""
        crash = self.crash
        said = str(crash) if isinstance(crash, CaiError) else f"the engine stopped on an internal error: {crash!r}"
        error = EngineClosedError("the engine was closed" if crash is None else said)
        error.__cause__ = crash
        return error
