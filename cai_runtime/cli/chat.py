"""Talk to a model in the terminal. Answers stream; the conversation lasts until /reset.

Ctrl-C stops the answer. Ctrl-D, or Ctrl-C twice at the prompt, leaves. Without a terminal every line of standard input is a
question.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cai_runtime.client import Client

HELP = "talk to a model in the terminal"
COMMANDS = """\
/reset  forget the conversation
/exit   leave (so do Ctrl-D, and Ctrl-C twice)
/help   this list
Ctrl-C  stop the answer"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from cai_runtime.cli.options import MODEL_HELP, add_model_arguments, add_sampling_arguments

    parser.add_argument("model", metavar="MODEL", nargs="?", help=MODEL_HELP)
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    add_sampling_arguments(parser, max_tokens=None)
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from cai_runtime.cli.options import open_client, sampling

    interactive = sys.stdin.isatty()
    with open_client(args.model, args) as client:
        chat = Conversation(client, system=args.system, params=sampling(args))
        if interactive:
            # Opens the model now, so that a bad model or option fails before the first question.
            warm_up: dict[str, Any] = {**chat.params, "max_tokens": 1}
            client.completions.create(prompt="\n", **warm_up)
            print("Type a question; /help lists the commands.")
        return talk(chat) if interactive else answer_lines(chat)


class Conversation:
    """The messages so far, the client that answers them and its sampling parameters."""

    def __init__(self, client: Client, *, system: str | None, params: dict[str, Any]):
        self.client, self.params = client, params
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[dict[str, str]] = [*self._opening]

    def reset(self) -> None:
        self.messages = [*self._opening]

    def ask(self, question: str) -> None:
        """Print the streamed answer to `question`, and add both to the messages.

        Ctrl-C raises KeyboardInterrupt. An interrupted answer is kept as far as it goes; without any answer the question is
        removed.
        """
        self.messages.append({"role": "user", "content": question})
        answer = ""
        try:
            with self.client.chat.completions.create(messages=self.messages, stream=True, **self.params) as stream:
                for chunk in stream:
                    text = (chunk.choices[0].delta.content or "") if chunk.choices else ""
                    answer += text
                    print(text, end="", flush=True)
        finally:
            if answer:
                self.messages.append({"role": "assistant", "content": answer})
                print(flush=True)
            else:
                self.messages.pop()


def talk(chat: Conversation) -> int:
    """Run the dialogue at a terminal."""
    from cai_runtime.errors import CaiError

    with contextlib.suppress(ImportError):  # not on every system
        import readline  # noqa: F401 - gives input() line editing and a history
    interrupted = False  # whether the last event was Ctrl-C
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print()
            if interrupted:
                return 0
            interrupted = True
            print("(Ctrl-C again, Ctrl-D or /exit to leave)")
            continue
        interrupted = False
        if not line:
            continue
        if re.fullmatch(r"/[a-z]+", line):
            if line in ("/exit", "/quit"):
                return 0
            command(chat, line)
            continue
        try:
            chat.ask(line)
        except KeyboardInterrupt:
            interrupted = True
            print("(stopped)")
        except CaiError as error:
            print(f"error: {error}", file=sys.stderr)
            if getattr(error, "code", None) == "context_length_exceeded":
                print("/reset starts a new conversation", file=sys.stderr)


def command(chat: Conversation, line: str) -> None:
    if line == "/reset":
        chat.reset()
        print("(the conversation is forgotten)")
    elif line == "/help":
        print(COMMANDS)
    else:
        print(f"{line} is not a command:\n{COMMANDS}")


def answer_lines(chat: Conversation) -> int:
    """Answer each line of standard input; /reset and /exit work too. The first error ends the program."""
    for line in map(str.strip, sys.stdin):
        if line == "/exit":
            break
        if line == "/reset":
            chat.reset()
        elif line:
            chat.ask(line)
    return 0
