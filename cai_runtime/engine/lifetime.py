"""An engine and its process: forked children, and engines that are still open when the interpreter exits."""

from __future__ import annotations

import os
import threading
import weakref
from typing import TYPE_CHECKING

from cai_runtime.errors import EngineClosedError

if TYPE_CHECKING:
    from cai_runtime.engine.loop import EngineLoop

# A forked child has none of its parent's threads: no engine thread, and no thread of torch's OpenMP pool, for which its
# first large operation would wait for ever.

_first_process: int | None = None


def enter_process() -> None:
    """Call before an engine is opened. Raises EngineClosedError in a child of a process that has opened one."""
    global _first_process
    if _first_process is None:
        _first_process = os.getpid()
    check_same_process(_first_process)


def check_same_process(process: int) -> None:
    """Raise EngineClosedError unless this is the process with the id `process`."""
    if os.getpid() != process:
        raise EngineClosedError(
            "this process was forked from one that has opened an engine, and can't use that engine nor open its own: "
            "start workers with multiprocessing's spawn"
        )


# At exit the interpreter waits for every thread that is not a daemon, once the main thread is done. One daemon thread
# waits for that moment and closes the engines that are still open. No atexit hook, and nothing before the first engine.

_open_loops: weakref.WeakSet[EngineLoop] = weakref.WeakSet()
_watcher: threading.Thread | None = None
_watcher_lock = threading.Lock()


def watch_exit(loop: EngineLoop) -> None:
    """Close the loop's engine when the main thread ends, unless it is closed before."""
    global _watcher
    with _watcher_lock:
        _open_loops.add(loop)
        if _watcher is None:
            _watcher = threading.Thread(target=_close_at_exit, name="cai-engine-exit", daemon=True)
            _watcher.start()


def _close_at_exit() -> None:
    threading.main_thread().join()
    with _watcher_lock:
        loops = list(_open_loops)
    for loop in loops:
        loop.inbox.stop()
