"""A forked child has the parent's memory but not its threads: its kernels must neither hang nor wait for those."""

import os
import subprocess
import sys
import textwrap

import pytest

SCRIPT = """
    import os, signal, threading, warnings
    import torch
    from cai_runtime.kernels import cpu_library
    from cai_runtime.kernels.norm import rms_norm_cpu

    warnings.simplefilter("ignore")  # newer Pythons warn about forking with threads
    torch.set_num_threads(1)  # torch's own pool does not survive a fork
    cpu_library.set_num_threads(3)
    x, weight = torch.ones(2000, 256), torch.ones(256)
    expected = float(rms_norm_cpu(x, weight, 1e-5)[0, 0])
    over = threading.Event()

    def busy():
        while not over.is_set():
            rms_norm_cpu(x, weight, 1e-5)

    thread = threading.Thread(target=busy, daemon=True)
    thread.start()
    for _ in range(20):
        child = os.fork()
        if child == 0:
            signal.alarm(20)  # ends a child that hangs
            os._exit(0 if float(rms_norm_cpu(x, weight, 1e-5)[0, 0]) == expected else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    over.set()
    thread.join()
    assert float(rms_norm_cpu(x, weight, 1e-5)[0, 0]) == expected
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_a_child_of_a_busy_parent_runs_kernels():
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)], capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
