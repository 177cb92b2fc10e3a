"""PTX text -> a program: the instructions of its one kernel, its registers, its labels."""

from __future__ import annotations

import re
from dataclasses import dataclass


class PtxError(Exception):
    """The program can't be executed, or does what no correct program does."""


@dataclass(frozen=True)
class Instruction:
    text: str
    predicate: str | None
    negated: bool
    words: tuple[str, ...]  # the opcode, split at its dots
    operands: tuple[str, ...]


@dataclass(frozen=True)
class Program:
    parameters: dict[str, str]  # name -> type
    threads: int  # of a block
    registers: dict[str, str]  # name -> type
    instructions: list[Instruction]
    labels: dict[str, int]


_STATEMENT = re.compile(r"^(?:@(!?)([%\w]+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.DOTALL)
_PARTS = re.compile(r"\s*(?:([{}])|([\w$]+):(?!:)|([^;]+);|$)")


def parse(ptx: str) -> Program:
    """Raises PtxError for a text with several kernels, functions or static shared memory."""
    text = re.sub(r"//[^\n]*", "", ptx)
    text = re.sub(r"^\s*\.(loc|file)\b[^\n]*", "", text, flags=re.MULTILINE)
    entries = re.findall(r"\.entry\s+\w+\s*\((.*?)\)([^{]*)\{", text, re.DOTALL)
    if len(entries) != 1 or re.search(r"\.func\b", text):
        raise PtxError(f"{len(entries)} kernels, or a function; expected one kernel alone")
    parameters = {name: kind for kind, name in re.findall(r"\.param\s+\.(\w+)[^,]*?(\w+_param_\d+)", entries[0][0])}
    threads = re.search(r"\.reqntid\s+(\d+)", entries[0][1])
    if threads is None:
        raise PtxError("the kernel does not state its number of threads (.reqntid)")
    registers: dict[str, str] = {}
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    body = _body(text, text.index("{", text.index(".reqntid")))
    for _, label, statement in _PARTS.findall(body):  # braces are scopes, whose registers have names of their own
        if label:
            labels[label] = len(instructions)
        elif statement.startswith(".reg"):
            registers |= _declared(statement)
        elif statement and not statement.startswith(".pragma"):
            instructions.append(_instruction(" ".join(statement.split())))
    return Program(parameters, int(threads[1]), registers, instructions, labels)


def _body(text: str, start: int) -> str:
    depth = 0
    for brace in re.finditer(r"[{}]", text[start:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[start + 1 : start + brace.start()]
    raise PtxError("the kernel's body does not end")


def _declared(statement: str) -> dict[str, str]:
    _, kind, names = statement.split(None, 2)
    found = {}
    for name in names.split(","):
        many = re.fullmatch(r"\s*([%\w]+)<(\d+)>\s*", name)
        every = [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name.strip()]
        found |= dict.fromkeys(every, kind[1:])
    return found


def _instruction(statement: str) -> Instruction:
    parts = _STATEMENT.match(statement)
    if parts is None:
        raise PtxError(f"not an instruction: {statement}")
    negated, predicate, opcode, operands = parts.groups()
    return Instruction(statement, predicate, negated == "!", tuple(opcode.split(".")), tuple(_operands(operands)))


def _operands(text: str) -> list[str]:
    """Separated by commas outside of braces and brackets."""
    found, depth, start = [], 0, 0
    for at, letter in enumerate(text + ","):
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and depth == 0:
            found.append(text[start:at].strip())
            start = at + 1
    return [operand for operand in found if operand]
