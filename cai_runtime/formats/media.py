"""Images and audio among a message's content: where they come from, how large they may be, what they are.

A source is a data URI, a `file:` path, or an http(s) address, which a fetcher of the caller's reads: nothing here uses the
network. The media type is that of the first bytes, and what the caller says of it must agree.
"""

from __future__ import annotations

import binascii
import stat
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

from cai_runtime.errors import ConversationError
from cai_runtime.scalars import shown

Fetcher = Callable[[str], bytes]  # of an http(s) address; may block
Kind = Literal["image", "audio"]
MAX_BYTES: dict[Kind, int] = {"image": 20 * 2**20, "audio": 25 * 2**20}
# What a model that takes it has, in `client.models.retrieve(...).capabilities`.
CAPABILITIES: dict[Kind, str] = {"image": "supports_image", "audio": "supports_audio"}
DETAILS = ("auto", "low", "high", "original")
AUDIO_FORMATS = {"wav": "audio/wav", "mp3": "audio/mpeg"}
_TYPES: dict[Kind, tuple[str, ...]] = {
    "image": ("image/png", "image/jpeg", "image/webp", "image/gif"),
    "audio": tuple(AUDIO_FORMATS.values()),
}
_ALIASES = {
    "image/jpg": "image/jpeg", "audio/x-wav": "audio/wav", "audio/wave": "audio/wav", "audio/vnd.wave": "audio/wav",
    "audio/mp3": "audio/mpeg",
}  # fmt: skip


@dataclass(frozen=True)
class Media:
    """An image or a piece of audio, its bytes checked for size and type, and not decoded.

    media_type: image/png, image/jpeg, image/webp, image/gif, audio/wav or audio/mpeg. detail: of an image, one of DETAILS.
    place: of the part in the request, for errors.
    """

    kind: Kind
    content: bytes = field(repr=False)
    media_type: str
    detail: str = "auto"
    place: str = field(default="", compare=False)


@dataclass(frozen=True)
class RemoteMedia:
    """The same at an http(s) address, not fetched yet. media_type: as the caller says; None: not said."""

    kind: Kind
    url: str
    media_type: str | None = None
    detail: str = "auto"
    place: str = field(default="", compare=False)

    def fetched(self, fetcher: Fetcher) -> Media:
        """Raises ConversationError: the fetcher fails, or what it returns is not such a file."""
        try:
            content = fetcher(self.url)
        except Exception as error:
            raise _wrong(self.place, f"{shown(self.url)} can't be fetched: {error!r}") from error
        if not isinstance(content, (bytes, bytearray, memoryview)):
            raise _wrong(self.place, f"the fetcher must return bytes, got {type(content).__name__}")
        return _checked(self.kind, bytes(content), self.media_type, self.detail, self.place)


def parse_image(part: Mapping[str, Any], place: str) -> Media | RemoteMedia:
    """The image of a part `{"type": "image_url", "image_url": {"url": ..., "detail": ...}}`.

    Raises:
        ConversationError: naming the place in the part.
    """
    inner = _inner(part, "image_url", place, ("url", "detail"))
    detail = inner.get("detail", "auto")
    if not isinstance(detail, str) or detail not in DETAILS:
        where = f"{place}.image_url.detail"
        raise _wrong(where, f"must be one of {', '.join(DETAILS)}, got {shown(detail)}")
    return _read("image", _text(inner, "url", f"{place}.image_url"), None, detail, place, f"{place}.image_url.url")


def parse_audio(part: Mapping[str, Any], place: str) -> Media | RemoteMedia:
    """The audio of a part `{"type": "input_audio", "input_audio": {"data": ..., "format": "wav" or "mp3"}}`. `data` is
    base64, or a source as images have it.

    Raises:
        ConversationError: naming the place in the part.
    """
    inner = _inner(part, "input_audio", place, ("data", "format"))
    said = _text(inner, "format", f"{place}.input_audio")
    if said not in AUDIO_FORMATS:
        raise _wrong(f"{place}.input_audio.format", f"must be {' or '.join(AUDIO_FORMATS)}, got {shown(said)}")
    data, where = _text(inner, "data", f"{place}.input_audio"), f"{place}.input_audio.data"
    if ":" not in data:  # which base64 never has
        data = f"data:{AUDIO_FORMATS[said]};base64,{data}"
    return _read("audio", data, AUDIO_FORMATS[said], "auto", place, where)


def lacking(part: Media | RemoteMedia) -> ConversationError:
    """What a model without the capability raises."""
    return ConversationError(
        f"'{part.place}': this model can't take {part.kind} input: it lacks the capability '{CAPABILITIES[part.kind]}'.",
        param=part.place,
        capability=part.kind,
    )


def _inner(part: Mapping[str, Any], key: str, place: str, allowed: Collection[str]) -> dict[str, Any]:
    """The given fields of the object at `key`."""
    where = f"{place}.{key}"
    for given in part:
        if given not in ("type", key):
            raise ConversationError.unknown(f"{place}.{given}")
    inner = part.get(key)
    if not isinstance(inner, Mapping):
        raise _wrong(where, f"must be an object with {' and '.join(allowed)}, got {shown(inner)}")
    for given in inner:
        if given not in allowed:
            raise ConversationError.unknown(f"{where}.{given}")
    return {name: value for name, value in inner.items() if value is not None}


def _text(fields: Mapping[str, Any], key: str, place: str) -> str:
    if key not in fields:
        raise ConversationError.missing(f"{place}.{key}")
    if not isinstance(fields[key], str):
        raise _wrong(f"{place}.{key}", f"must be a string, got {shown(fields[key])}")
    return str(fields[key])


def _read(kind: Kind, source: str, said: str | None, detail: str, place: str, where: str) -> Media | RemoteMedia:
    """The media at a source. said: its media type, as the caller says. where: of the source in the request."""
    scheme, _, rest = source.partition(":")
    match scheme.lower():
        case "data":
            content, declared = _of_data_uri(kind, rest, where)
            if said is not None and declared != said:
                raise _wrong(where, f"is a data URI of {declared}, but the format says {said}")
            return _checked(kind, content, declared, detail, place, where)
        case "file":
            return _checked(kind, _of_file(kind, rest, where), said, detail, place, where)
        case "http" | "https" if rest.startswith("//") and len(rest) > 2:
            return RemoteMedia(kind, source, said, detail, place)
    raise _wrong(where, f"must be a data URI, a file: path or an http(s) address, got {shown(source)}")


def _of_data_uri(kind: Kind, rest: str, where: str) -> tuple[bytes, str]:
    """The bytes of `TYPE;base64,DATA`, and the type."""
    header, comma, data = rest.partition(",")
    declared, _, encoding = header.lower().partition(";")
    declared = _ALIASES.get(declared, declared)
    if not comma or encoding.strip() != "base64":
        raise _wrong(where, f"must be a data URI such as data:{_TYPES[kind][0]};base64,..., got {shown(rest)}")
    if declared not in _TYPES[kind]:
        raise _wrong(where, f"must be of the type {', '.join(_TYPES[kind])}, got {shown(declared)}")
    if len(data) > -(-MAX_BYTES[kind] // 3) * 4:
        raise _too_large(kind, where)
    try:
        return binascii.a2b_base64(data, strict_mode=True), declared
    except ValueError as error:  # binascii.Error is one, and so is a character beyond ASCII
        raise _wrong(where, f"holds no valid base64: {error}") from None


def _of_file(kind: Kind, rest: str, where: str) -> bytes:
    """The bytes of the file at `rest`: a path, or //, a host, which is this one, and a path. Percent-encoded."""
    if rest.startswith("//"):
        host, slash, rest = rest[2:].partition("/")
        if host.lower() not in ("", "localhost") or not slash:
            raise _wrong(where, f"must name a file of this machine, such as file:///path, got the host {shown(host)}")
        rest = slash + rest
    name = rest
    try:
        name = unquote(rest, errors="strict")
        path = Path(name)
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for whoever writes to it
            raise _wrong(where, f"{shown(name)} is no file")
        if found.st_size > MAX_BYTES[kind]:
            raise _too_large(kind, where)
        with path.open("rb") as file:
            return file.read(MAX_BYTES[kind] + 1)
    except (OSError, ValueError) as error:  # of a null byte, or of no UTF-8
        raise _wrong(where, f"{shown(name)} can't be read: {getattr(error, 'strerror', None) or error}") from None


def _checked(kind: Kind, content: bytes, said: str | None, detail: str, place: str, where: str | None = None) -> Media:
    """Raises ConversationError: it is empty or too large, of no known type, or of another one than `said`."""
    where = where or place
    if not content:
        raise _wrong(where, f"holds no {kind}: it is empty")
    if len(content) > MAX_BYTES[kind]:
        raise _too_large(kind, where)
    found = _type_of(content)
    if found not in _TYPES[kind]:
        raise _wrong(where, f"must be of the type {', '.join(_TYPES[kind])}: its first bytes are those of none of them")
    if said is not None and found != said:
        raise _wrong(where, f"is said to be {said}, but its first bytes are those of {found}")
    return Media(kind, content, found, detail, place)


def _type_of(content: bytes) -> str | None:
    """The media type by the first bytes; None: of no known one."""
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if content.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if content.startswith((b"GIF87a", b"GIF89a")):
        return "image/gif"
    if content[:4] == b"RIFF" and content[8:12] in (b"WEBP", b"WAVE"):
        return "image/webp" if content[8:12] == b"WEBP" else "audio/wav"
    # A tag before the audio, or a frame's header: 11 bits of ones, a version (01 is reserved), layer III, a check bit.
    if content.startswith((b"ID3", b"\xff\xe2", b"\xff\xe3", b"\xff\xf2", b"\xff\xf3", b"\xff\xfa", b"\xff\xfb")):
        return "audio/mpeg"
    return None


def _too_large(kind: Kind, where: str) -> ConversationError:
    return _wrong(where, f"is larger than {MAX_BYTES[kind] // 2**20} MiB, the most that {kind} input may have")


def _wrong(where: str, problem: str) -> ConversationError:
    return ConversationError(f"'{where}' {problem}.", param=where)
