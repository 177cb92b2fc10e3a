"""JSON Schema's regular expressions, those of JavaScript (ECMA-262), in the syntax of Rust's `regex`.

Where the two read the same text differently, it is rewritten; where that can't be, it is refused.
"""

from __future__ import annotations

import re

# What `\s` and the like stand for: in JavaScript, where `\d` and `\w` know ASCII alone, and in Python, where they know
# Unicode. A class allows what both do: the first of a pair has what is in both, the second what is in either.
_CLASSES = {
    "s": (
        r"\t\n\x0b\x0c\r \u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000",
        r"\t\n\x0b\x0c\r\x1c-\x20\x85\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff",
    ),
    "d": ("0-9", r"\p{Nd}"),
    "w": ("0-9A-Za-z_", r"\p{L}\p{M}\p{N}_"),
}
_DOT = r"[^\n\r\u2028\u2029]"
_ESCAPE = re.compile(
    r"\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|u\{[0-9a-fA-F]+\}|[pP]\{[^}]*\}|[dDwWsStnrfv]|[^a-zA-Z0-9])", re.DOTALL
)
_ASSERTIONS = ("(?=", "(?!", "(?<=", "(?<!")


def rust_regex(pattern: str) -> str:
    """The same regular expression for llguidance.

    Raises:
        ValueError: it has something that Rust's syntax or a mask does not know; the message names it.
    """
    out: list[str] = []
    at, in_class, negated = 0, False, False
    while at < len(pattern):
        char = pattern[at]
        if char == "\\":
            found = _ESCAPE.match(pattern, at)
            if found is None:
                raise ValueError(f"the escape {pattern[at : at + 2]!r} is not supported in a regular expression")
            text = found.group()
            if text[1].lower() in _CLASSES and len(text) == 2:
                both, either = _CLASSES[text[1].lower()]
                if text[1].islower():
                    text = f"[{either if negated else both}]"
                else:
                    text = f"[^{both if negated else either}]"
            out.append(text)
            at = found.end()
            continue
        if in_class:
            if char == "]":
                in_class = negated = False
            elif char in "[&~" or (char == "-" and pattern.startswith("--", at)):
                char = "\\" + char  # an operator of Rust's, alone or doubled
        elif char == "[":
            in_class = True
            start = pattern[at + 1 : at + 3]
            if start[:1] == "]" or start == "^]":
                raise ValueError("an empty class is not supported in a regular expression")
            if start[:1] == "^":
                char, at, negated = "[^", at + 1, True
        elif char == ".":
            char = _DOT
        elif char == "(" and pattern.startswith(_ASSERTIONS, at):
            raise ValueError("lookahead and lookbehind are not supported in a regular expression")
        elif char == "(" and re.match(r"\(\?[^:<]", pattern[at:]):
            raise ValueError("flags are not supported in a regular expression")
        out.append(char)
        at += 1
    return "".join(out)
