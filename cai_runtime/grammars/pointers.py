"""JSON pointers (RFC 6901) in the fragments of a schema's references."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

_INDEX = re.compile(r"0|[1-9][0-9]{0,8}")


def escaped(name: str) -> str:
    """A name as a step of a pointer."""
    return name.replace("~", "~0").replace("/", "~1")


def way(fragment: str, document: Any) -> Iterator[tuple[str, Any]]:
    """The steps of a pointer, each with what it leads to; of "", which is the document itself, there are none.

    Args:
        fragment: of a reference, behind its "#", such as "/$defs/a~1b" or "/anyOf/0"; it may be percent-encoded.
        document: a JSON value.

    Raises:
        LookupError: a step leads to nothing.
    """
    node = document
    for step in unquote(fragment).split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        if isinstance(node, Mapping) and step in node:
            node = node[step]
        elif isinstance(node, (list, tuple)) and _INDEX.fullmatch(step) and int(step) < len(node):
            node = node[int(step)]
        else:
            raise LookupError(f"there is nothing at {step!r}")
        yield step, node


def pointed(fragment: str, document: Any) -> Any:
    """What a pointer leads to. See `way`."""
    return [document, *(node for _, node in way(fragment, document))][-1]
