"""The conversation format of models without tool calls: content, and perhaps a thought before it."""

from __future__ import annotations

from cai_runtime.formats.marked import MarkedFormat


class PlainFormat(MarkedFormat):
    name = "plain"
    has_calls = False
