import builtins
import io
import os
import pty
import select
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from cai_runtime.api.errors import BadRequestError
from cai_runtime.cli import main
from cai_runtime.cli.chat import Conversation, talk


class FakeClient:
    """Answers with what the test wants; a piece that is an exception is raised in the middle of the stream."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = []
        self.closed = 0
        self.chat = SimpleNamespace(completions=SimpleNamespace(create=self.create))

    def create(self, *, messages, stream, **params):
        assert stream
        self.asked.append([(m["role"], m["content"]) for m in messages])
        return FakeStream(self, self.answers.pop(0))


class FakeStream:
    def __init__(self, client, pieces):
        self.client, self.pieces = client, pieces

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.client.closed += 1

    def __iter__(self):
        for piece in self.pieces:
            if isinstance(piece, BaseException):
                raise piece
            yield SimpleNamespace(choices=[SimpleNamespace(delta=SimpleNamespace(content=piece))])


@pytest.fixture
def type_lines(monkeypatch):
    """Has input() return these one after another, then end of file; exceptions are raised."""

    def start(*lines):
        left = list(lines)

        def read(prompt=""):
            if not left:
                raise EOFError
            line = left.pop(0)
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr(builtins, "input", read)
        return left

    return start


def conversation(*answers, system=None):
    client = FakeClient(*answers)
    return client, Conversation(client, system=system, params={})  # type: ignore[arg-type]


def test_history_is_kept_until_reset(type_lines, capsys):
    client, chat = conversation(["Par", "is", None], ["Yes"], ["Hi"], system="Be short.")
    type_lines("Capital of France?", "", "Sure?", "/reset", "Hello", "/exit", "never asked")
    assert talk(chat) == 0
    system = ("system", "Be short.")
    first = [system, ("user", "Capital of France?")]
    assert client.asked == [first, [*first, ("assistant", "Paris"), ("user", "Sure?")], [system, ("user", "Hello")]]
    out = capsys.readouterr().out
    assert "Paris\n" in out
    assert "forgotten" in out


def test_ctrl_c_stops_the_answer_and_not_the_program(type_lines, capsys):
    client, chat = conversation(["Once ", "upon", KeyboardInterrupt()], ["More"])
    type_lines("Tell a story", "Go on")
    assert talk(chat) == 0
    assert "Once upon\n(stopped)\nMore\n" in capsys.readouterr().out
    assert client.closed == 2
    assert client.asked[1] == [("user", "Tell a story"), ("assistant", "Once upon"), ("user", "Go on")]


def test_a_question_stopped_before_its_answer_is_forgotten(type_lines):
    client, chat = conversation([KeyboardInterrupt()], ["Hi"])
    type_lines("Tell a story", "Hello")
    assert talk(chat) == 0
    assert client.asked[1] == [("user", "Hello")]


def test_ctrl_c_at_the_prompt_leaves_the_second_time(type_lines):
    _, chat = conversation(["Hi"])
    left = type_lines(KeyboardInterrupt(), "Hello", KeyboardInterrupt(), KeyboardInterrupt(), "never read")
    assert talk(chat) == 0
    assert left == ["never read"]


def test_ctrl_c_at_the_prompt_after_a_stopped_answer_leaves(type_lines):
    _, chat = conversation(["Once", KeyboardInterrupt()])
    left = type_lines("Tell a story", KeyboardInterrupt(), "never read")
    assert talk(chat) == 0
    assert left == ["never read"]


def test_an_api_error_is_told_and_the_chat_goes_on(type_lines, capsys):
    too_long = BadRequestError("too long", param="messages", code="context_length_exceeded")
    client, chat = conversation([too_long], ["Hi"])
    type_lines("long", "Hello")
    assert talk(chat) == 0
    assert capsys.readouterr().err == "error: too long\n/reset starts a new conversation\n"
    assert client.asked[1] == [("user", "Hello")]


def test_unknown_commands_are_not_questions_but_paths_are(type_lines, capsys):
    client, chat = conversation(["A directory"])
    type_lines("/rest", "/help", "/usr/bin is what?")
    assert talk(chat) == 0
    assert client.asked == [[("user", "/usr/bin is what?")]]
    out = capsys.readouterr().out
    assert "/rest is not a command" in out
    assert out.count("/reset  forget") == 2


def test_lines_of_standard_input_are_questions(tiny_dir, capsys, monkeypatch):
    from cai_runtime import Client

    def ask(client, *messages):
        reply = client.chat.completions.create(
            messages=[{"role": r, "content": c} for r, c in messages], temperature=0, max_tokens=8
        )
        return reply.choices[0].message.content

    with Client(tiny_dir) as client:
        first = ask(client, ("user", "hi"))
        second = ask(client, ("user", "hi"), ("assistant", first), ("user", "more"))
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n\nmore\n/reset\nhi\n/exit\nnot asked\n"))
    assert main(["chat", str(tiny_dir), "--temperature", "0", "--max-tokens", "8"]) == 0
    assert capsys.readouterr().out == f"{first}\n{second}\n{first}\n"


def test_an_error_ends_a_chat_without_a_terminal(tiny_dir, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\nmore\n"))
    assert main(["chat", str(tiny_dir), "--temperature", "7"]) == 1
    assert "'temperature'" in capsys.readouterr().err


class Terminal:
    """`cai chat` behind a pseudo-terminal."""

    def __init__(self, *arguments):
        self.master, slave = pty.openpty()
        command = [sys.executable, "-m", "cai_runtime.cli", "chat", *arguments]
        self.process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave)
        os.close(slave)
        self.seen = b""

    def wait_for(self, text):
        """Read on until `text` has come, and forget what came before its end."""
        while text not in self.seen:
            self.read(f"no {text!r}")
        self.seen = self.seen.partition(text)[2]

    def read(self, problem):
        readable, _, _ = select.select([self.master], [], [], 120)
        assert readable, f"{problem} for two minutes: {self.seen[-200:]!r}"
        piece = os.read(self.master, 4096)
        assert piece, f"ended, {problem}: {self.seen!r}"
        self.seen += piece

    def type(self, line):
        os.write(self.master, line + b"\n")

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)


def test_at_a_terminal_ctrl_c_stops_a_real_answer(tiny_dir):
    terminal = Terminal(str(tiny_dir), "--temperature", "0")
    try:
        terminal.wait_for(b"> ")
        for _ in range(2):
            terminal.type(b"go on for thousands of tokens")
            terminal.wait_for(b"tokens\r\n")
            while len(terminal.seen) < 20:  # the answer is under way
                terminal.read("no answer")
            terminal.process.send_signal(signal.SIGINT)
            terminal.wait_for(b"(stopped)")
            terminal.wait_for(b"> ")
        terminal.type(b"/exit")
        assert terminal.process.wait(timeout=60) == 0
    finally:
        terminal.close()
