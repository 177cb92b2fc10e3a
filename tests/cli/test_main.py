import os
import subprocess
import sys
from importlib import import_module
from pkgutil import iter_modules

import pytest

import cai_runtime.cli
from cai_runtime.cli import COMMANDS, main

NOT_COMMANDS = {"__init__", "__main__", "options"}
HEAVY = {"torch", "transformers", "openai", "numpy"}


def test_the_list_of_commands_is_that_of_the_files():
    files = {module.name for module in iter_modules(cai_runtime.cli.__path__)}
    assert files - NOT_COMMANDS == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_in_the_list_is_the_command_s_own(name, capsys):
    assert COMMANDS[name] == import_module(f"cai_runtime.cli.{name}").HELP
    with pytest.raises(SystemExit) as left:
        main([name, "--help"])
    assert left.value.code == 0
    assert f"usage: cai {name}" in capsys.readouterr().out


def test_help_lists_every_command_and_imports_nothing_heavy():
    code = (
        "import sys\nfrom cai_runtime.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as left:\n    assert not left.code\n"
        f"print('imported', sorted({HEAVY!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(f"\n    {name} " in done.stdout for name in COMMANDS)
    assert done.stdout.endswith("imported []\n")


def test_no_command_is_help(capsys):
    with pytest.raises(SystemExit) as left:
        main([])
    assert left.value.code == 0
    assert "usage: cai" in capsys.readouterr().out


def test_version(capsys):
    from importlib.metadata import version

    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"cai_runtime {version('cai-runtime')}\n"


def test_unknown_command_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as left:
        main(["chatt"])
    assert left.value.code == 2
    assert "chatt" in capsys.readouterr().err


def test_typed_errors_are_told_without_a_traceback(capsys, tmp_path):
    assert main(["inspect", str(tmp_path / "nothing")]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: no such checkpoint directory")
    assert "Traceback" not in said.err


def test_other_errors_are_not_hidden(monkeypatch):
    monkeypatch.setattr("cai_runtime.cli.env.environment", lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        main(["env"])


def test_ctrl_c_gives_130(monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("cai_runtime.cli.env.environment", interrupted)
    assert main(["env"]) == 130


def test_a_reader_that_goes_away_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "cai_runtime.cli", "models"]
    with os.fdopen(writing, "wb") as pipe:
        done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (141, "")
