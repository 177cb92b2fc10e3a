"""`cai compress`: bars, Ctrl-C, errors."""

import os
import signal
import subprocess
import sys

import pytest

from cai_runtime.cli import main

FAST = ["--fast", "--samples", "4", "--sequence-length", "32", "--rank-multiple", "1", "--no-evaluation"]


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text").mkdir()
    file = tmp_path / "text/words.txt"
    file.write_text("Some words that follow each other, again and again. " * 40)
    return file


def compress(tiny_dir, text, dst, *more):
    return main(["compress", str(tiny_dir), str(dst), "--calibration", str(text), *FAST, *more])


@pytest.mark.parametrize(
    ("terminal", "more", "shown"), [(True, [], True), (True, ["--no-progress"], False), (False, [], False)]
)
def test_bars(tiny_dir, text, tmp_path, monkeypatch, capsys, terminal, more, shown):
    """A bar for each stage on a terminal, with the time that is left; none elsewhere, or on request."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    assert compress(tiny_dir, text, tmp_path / "slim", *more) == 0
    err = capsys.readouterr().err
    for stage in ("forward", "backward", "blocks", "write"):
        assert (f"{stage}: 100%" in err) == shown
    assert ("00:00<00:00" in err) == shown


def test_a_dry_run_writes_nothing_and_knows_a_taken_place(tiny_dir, text, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert compress(tiny_dir, text, tmp_path / "slim", "--dry-run") == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("14 linear layers", "checkpoint", "work directory", "memory", "time"))
    assert sorted(tmp_path.rglob("*")) == before
    assert compress(tiny_dir, text, text.parent, "--dry-run", "--overwrite") == 1
    assert (
        f"would be lost; choose another destination, or empty it first (file {text.parent})" in capsys.readouterr().err
    )


def test_ctrl_c_says_how_to_go_on(tiny_dir, text, tmp_path):
    """In a process of its own, on its way through the blocks; then the same command goes on to the end."""
    code = (
        "import os, signal, sys; from cai_runtime.cli import main; from cai_runtime.compressor.run import Run\n"
        "if sys.argv.pop(1) == 'stop':\n"
        "    Run._compress_blocks = lambda *_: os.kill(os.getpid(), signal.SIGINT)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    dst = tmp_path / "slim"
    command = ["compress", str(tiny_dir), str(dst), "--calibration", str(text), *FAST]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    stopped = subprocess.run([sys.executable, "-c", code, "stop", *command], capture_output=True, text=True, env=env)
    assert stopped.returncode == 128 + signal.SIGINT and stopped.stdout == ""
    assert f"interrupted: what is finished is kept in {tmp_path / '.slim.work'}; run the same command" in stopped.stderr
    assert "Traceback" not in stopped.stderr and not dst.exists()
    done = subprocess.run([sys.executable, "-c", code, "go", *command], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and done.stdout.endswith(f"{dst}\n") and done.stderr == ""
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["slim", "text"]
