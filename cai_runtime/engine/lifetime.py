"""An engine and its process: engines that are still open when the interpreter exits."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cai_runtime.engine.loop import EngineLoop

# At exit the interpreter waits for every thread that is not a daemon, once the main thread is done. One daemon thread
# waits for that moment and closes the engines that are still open. No atexit hook, and nothing before the first engine.

_open_loops: weakref.WeakSet[EngineLoop] = weakref.WeakSet()
_watcher: threading.Thread | None = None
_watcher_lock = threading.Lock()


def watch_exit(loop: EngineLoop) -> None:
    global _watcher
    with _watcher_lock:
        _open_loops.add(loop)
        if _watcher is None or not _watcher.is_alive():  # not alive: in a forked child
            _watcher = threading.Thread(target=_close_at_exit, name="cai-engine-exit", daemon=True)
            _watcher.start()


def _close_at_exit() -> None:
    threading.main_thread().join()
    with _watcher_lock:
        loops = list(_open_loops)
    for loop in loops:
        loop.inbox.put(None)
