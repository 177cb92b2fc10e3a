"""The addresses that sources understand: `hf://` and `pypi://`, taken apart."""

from __future__ import annotations

import re
from dataclasses import dataclass

from cai_runtime.errors import SourceError


@dataclass(frozen=True)
class HubUri:
    """`hf://org/name[@revision][/file]`. A slash inside the revision is written %2F where a file follows."""

    repo: str
    revision: str
    file: str | None

    @staticmethod
    def parse(uri: str) -> HubUri:
        """Raises SourceError on a malformed address."""
        match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@([^/]+))?(?:/(.+))?", uri)
        if match is None or not _safe(match[3] or "x"):
            raise SourceError(f"{uri!r} is not hf://org/name[@revision] or hf://org/name[@revision]/file")
        revision = (match[2] or "main").replace("%2F", "/").replace("%2f", "/")
        return HubUri(match[1], revision, match[3])


@dataclass(frozen=True)
class WheelUri:
    """`pypi://package[==version]/path/in/wheel`."""

    requirement: str
    member: str

    @staticmethod
    def parse(uri: str) -> WheelUri:
        """Raises SourceError on a malformed address."""
        name = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
        match = re.fullmatch(rf"pypi://({name}(?:==[A-Za-z0-9.+!_-]+)?)/(.+)", uri)
        if match is None or not _safe(match[2]):
            raise SourceError(f"{uri!r} is not pypi://package[==version]/path/in/wheel")
        return WheelUri(match[1], match[2])


def _safe(path: str) -> bool:
    """Whether `path` is a plain relative path of a file, with no way out of its root."""
    return not any(part in ("", ".", "..") for part in path.split("/")) and "\\" not in path
