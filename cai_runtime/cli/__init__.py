"""`cai`: one module per command, each with `HELP`, `add_arguments(parser)` and `run(args) -> exit status`.

Only the chosen command's module is imported, so that `cai --help` starts at once. The list below repeats their
help; `tests/cli/test_main.py` holds it against the modules.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "pull": "fetch a model into the cache, or into a directory, in Hugging Face layout",
    "compress": "compress a model to a slim checkpoint",
    "export": "write a slim checkpoint as a stock dense one",
    "inspect": "show what a checkpoint holds: kind, rank, parameters, bytes and keep per module",
    "eval": "perplexity, divergence, agreement and samples of one checkpoint, or of two side by side",
    "chat": "talk to a model in the terminal",
    "complete": "continue a text",
    "transcribe": "transcribe audio files to text, subtitles or JSON",
    "batch": "answer a file of requests in OpenAI's batch format",
    "models": "list the catalogue and the models on this machine",
    "bench": "measure the speed of a checkpoint, alone or beside other engines",
    "demo": "fetch a small model, compress it, chat with it and show what that saved",
    "env": "show versions, devices, kernels and settings",
}

INTERRUPTED = 130  # 128 + SIGINT, as shells report it
PIPE_CLOSED = 141  # 128 + SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line, by default this process's, and return its exit status.

    A CaiError, API errors included, is printed as `error: ...` on stderr and gives 1. Ctrl-C gives 130. A closed pipe
    (`cai models | head -1`) gives 141 without a message. Usage errors and `--help` raise SystemExit, as argparse does.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    from cai_runtime.errors import CaiError

    try:
        status = _run(arguments)
        sys.stdout.flush()
        return status
    except CaiError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The interpreter flushes stdout again at exit, and that flush must not fail.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in COMMANDS:
        _top_parser().parse_args(arguments or ["--help"])
        return 0  # not reached: argparse prints help or an error and exits
    name, *rest = arguments
    command = import_module(f"cai_runtime.cli.{name}")
    parser = argparse.ArgumentParser(prog=f"cai {name}", description=command.__doc__, formatter_class=_Formatter)
    command.add_arguments(parser)
    if getattr(command, "SUBCOMMANDS", False):
        return command.run(parser.parse_args(rest))
    # Intermixed parsing allows options between MODEL and PROMPT. argparse refuses it for commands with subcommands.
    return command.run(parser.parse_intermixed_args(rest))


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the docstring's line breaks."""


class _CommandFormatter(argparse.HelpFormatter):
    """Has every command's help beside its name: argparse forgets that the names are indented."""

    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(action)
        self._action_max_length = max(self._action_max_length, 4 + max(map(len, COMMANDS)))


def _top_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cai",
        description="In-process inference for language models stored as tensor-network factors.",
        epilog="`cai COMMAND --help` explains a command.",
        formatter_class=_CommandFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text)
    return parser


class _Version(argparse.Action):
    """argparse's version action, except that it looks the version up only when used."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from cai_runtime.bench.machine import version_of

        print(f"cai_runtime {version_of('cai-runtime')}")
        parser.exit()
