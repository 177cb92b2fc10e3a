"""A forked child of a process with an engine: every way to use the engine, or to open one, ends with a typed error."""

import os
import subprocess
import sys
import textwrap

import pytest

SCRIPT = """
    import asyncio, os, signal, threading, warnings
    import numpy as np
    from cai_runtime.engine.engine import Engine
    from cai_runtime.engine.open import open_engine
    from cai_runtime.engine.request import Request, SamplingParams
    from cai_runtime.errors import EngineClosedError

    class Runner:
        page_size, num_pages, vocab_size, max_context = 4, 4096, 8, 16_000
        def run(self, step):
            return np.eye(8, dtype=np.float32)[[s.token_ids[-1] for s in step if s.wanted]]
        def close(self):
            pass

    class Tokenizer:
        def decode(self, token_ids, skip_special_tokens=True):
            return "x" * len(token_ids)

    warnings.simplefilter("ignore")  # newer Pythons warn about forking with threads
    request = Request([1], SamplingParams(max_tokens=15_000, temperature=0.0))
    engine = Engine(Runner(), Tokenizer(), eos_token_ids=[])
    handle = engine.submit(request)
    deltas = iter(handle)
    next(deltas)
    uses = {
        "submit": lambda: engine.submit(request),
        "result": handle.result,
        "aresult": lambda: asyncio.run(handle.aresult()),
        "read on": lambda: list(deltas),
        "check": engine.check_integrity,
        "open": lambda: open_engine("nowhere"),
        "make": lambda: Engine(Runner(), Tokenizer(), eos_token_ids=[]),
    }
    for name, use in uses.items():
        child = os.fork()
        if child == 0:
            signal.alarm(20)  # ends a child that hangs
            try:
                use()
            except EngineClosedError as error:
                os._exit(7 if "spawn" in str(error) and not engine.alive else 2)
            os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code == 7, (name, code)
    assert engine.alive
    deltas.close()
    engine.close()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_a_child_gets_a_typed_error():
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)], capture_output=True, text=True, timeout=200, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
