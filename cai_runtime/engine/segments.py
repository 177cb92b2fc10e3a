"""The input of a sequence as a list of segments: tokens, rows in place of embeddings, an encoder's output."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

from cai_runtime.errors import InvalidRequestError

GIVEN = -2  # the id of a position whose row is given: no token, never looked up in the embedding


@dataclass(frozen=True, eq=False)
class GivenRows:
    """Rows in place of token embeddings, such as an image's.

    rows: [n, hidden], n at least 1, in a form that the runner takes. digest: of all that determines them; equal digests
    mean equal rows.
    """

    rows: Any
    digest: bytes


@dataclass(frozen=True, eq=False)
class EncoderInput:
    """What an encoder reads once, and every decoded token attends to, such as a window of audio.

    features: in a form that the runner takes. rows: positions of the encoder's output, at least 1. digest: of the features;
    equal digests mean equal outputs.
    """

    features: Any
    rows: int
    digest: bytes


Segment = Sequence[int] | GivenRows | EncoderInput  # token ids, or one of the others


@dataclass(frozen=True, eq=False)
class PlacedRows:
    """Given rows and the positions that they take, start to end - 1."""

    start: int
    rows: Any
    digest: bytes

    @property
    def end(self) -> int:
        return self.start + len(self.rows)

    def within(self, start: int, end: int) -> PlacedRows | None:
        """The rows at positions start to end - 1, their start counted from there; None if there are none."""
        first, last = max(start, self.start), min(end, self.end)
        if first >= last:
            return None
        return PlacedRows(first - start, self.rows[first - self.start : last - self.start], self.digest)


@dataclass(frozen=True, eq=False)
class Prompt:
    """Segments laid out over positions. token_ids: `GIVEN` where rows are given. salt: what besides tokens and given rows
    determines the content of the cache; equal salts mean equal content for equal tokens."""

    token_ids: list[int]
    given: tuple[PlacedRows, ...] = ()
    encoder: EncoderInput | None = None
    salt: bytes = b""

    @property
    def known_ids(self) -> list[int]:
        """The token ids alone, without given rows."""
        return self.token_ids if not self.given else [t for t in self.token_ids if t != GIVEN]


def lay_out(segments: Sequence[Segment], *, able: frozenset[str], cache_salt: bytes = b"") -> Prompt:
    """The prompt that segments make. able: capabilities of the runner, "given_rows" and "encoder".

    Raises InvalidRequestError for a segment that the runner can't take, an empty one, or two encoder inputs."""
    token_ids: list[int] = []
    given: list[PlacedRows] = []
    encoder: EncoderInput | None = None
    for segment in segments:
        if isinstance(segment, GivenRows):
            _check_able("given_rows", "rows in place of embeddings", able)
            _check_digest(segment.digest)
            placed = PlacedRows(len(token_ids), segment.rows, bytes(segment.digest))
            if placed.end == placed.start:
                raise InvalidRequestError("given rows are empty; give at least one row")
            given.append(placed)
            token_ids += [GIVEN] * (placed.end - placed.start)
        elif isinstance(segment, EncoderInput):
            _check_able("encoder", "an encoder's input", able)
            _check_digest(segment.digest)
            if encoder is not None:
                raise InvalidRequestError("a prompt has two encoder inputs; give one")
            if segment.rows < 1:
                raise InvalidRequestError(f"an encoder's output has {segment.rows} rows; it must be at least 1")
            encoder = segment
        else:
            token_ids += _checked_ids(segment)
    if not token_ids:
        raise InvalidRequestError("the prompt has no tokens; give at least one")
    return Prompt(token_ids, tuple(given), encoder, _salt(cache_salt, encoder))


def _checked_ids(segment: Sequence[int]) -> list[int]:
    try:
        return list(map(index, segment))
    except TypeError as error:
        raise InvalidRequestError(f"prompt_ids must be integers: {error}") from error


def _check_able(capability: str, what: str, able: frozenset[str]) -> None:
    if capability not in able:
        raise InvalidRequestError(f"the prompt has {what}, but this model lacks the capability {capability!r}")


def _check_digest(digest: bytes) -> None:
    if not isinstance(digest, (bytes, bytearray)) or not digest:
        raise InvalidRequestError("a segment's digest must be bytes, at least one: equal digests mean equal content")


def _salt(cache_salt: bytes, encoder: EncoderInput | None) -> bytes:
    if not cache_salt and encoder is None:
        return b""
    parts = [bytes(cache_salt), b"" if encoder is None else b"encoder" + bytes(encoder.digest)]
    return hashlib.blake2b(b"".join(len(p).to_bytes(8, "little") + p for p in parts), digest_size=16).digest()
