"""The lines of a batch: requests of OpenAI's input format, and results of its output format."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from cai_runtime.scalars import shown

BatchResult = dict[str, Any]  # a line of the output, see `answered` and `refused`
ID_PREFIX = "batch_req_"
METHOD = "POST"
FIELDS = ("custom_id", "method", "url", "body")


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """A request of a batch. id: of its result. number: of its line in the file, or its place among the others, from 1."""

    id: str
    number: int
    custom_id: str
    url: str
    body: dict[str, Any]


def answered(request: BatchRequest, status_code: int, body: Mapping[str, Any]) -> BatchResult:
    """The result of a request that an endpoint has answered, or refused with an error body."""
    response = {"status_code": status_code, "request_id": f"req_{secrets.token_hex(12)}", "body": body}
    return {"id": request.id, "custom_id": request.custom_id, "response": response, "error": None}


def succeeded(result: BatchResult) -> bool:
    return result["error"] is None and result["response"]["status_code"] == 200


class _LineError(Exception):
    """What is wrong with a line."""

    def __init__(self, code: str, message: str, param: str | None = None):
        super().__init__(message)
        self.code, self.param = code, param


class RequestReader:
    """Makes requests of lines, and remembers their custom ids.

    Args:
        urls: the endpoints that there are.
        noun: what a place is called in messages: "Line" of a file, "Request" of an iterable.
    """

    def __init__(self, urls: Collection[str], noun: str = "Line"):
        self._urls = urls
        self._noun = noun
        self._numbers: dict[str, int] = {}  # of each custom id, the place where it was first seen

    def read(self, item: Any, number: int) -> BatchRequest | BatchResult:
        """The request of an item; of one that is none, the result that says why.

        The id of a result depends on the bytes of its line alone, so that a later run knows whether the line has changed.
        Two lines can be equal only if the second is refused: what is refused has the line's number in its id.

        Args:
            item: a line as bytes or text, or a mapping with the same fields.
            number: its place, from 1.
        """
        custom_id = None
        try:
            fields = _fields(item)
            custom_id = self._custom_id(fields, number)
            return self._request(item, number, custom_id, fields)
        except _LineError as error:
            message = f"{self._noun} {number}: {error}"
            return refused(_id(item, number), custom_id, error.code, message, error.param, number)

    def _custom_id(self, fields: Mapping[Any, Any], number: int) -> str:
        custom_id = _required(fields, "custom_id", str)
        if not custom_id:
            raise _LineError("invalid_value", "'custom_id' is empty", "custom_id")
        first = self._numbers.setdefault(custom_id, number)
        if first != number:
            # The result gets no custom id: it must not pass for the answer to the first request.
            raise _LineError(
                "duplicate_custom_id",
                f"the custom_id {shown(custom_id)} is that of {self._noun.lower()} {first} already",
                "custom_id",
            )
        return custom_id

    def _request(self, item: Any, number: int, custom_id: str, fields: Mapping[Any, Any]) -> BatchRequest:
        method = _required(fields, "method", str)
        if method != METHOD:
            raise _LineError("invalid_method", f"'method' must be \"{METHOD}\", got {shown(method)}", "method")
        url = _required(fields, "url", str)
        if url not in self._urls:
            raise _LineError("invalid_url", f"'url' must be one of {', '.join(self._urls)}, got {shown(url)}", "url")
        body = dict(_required(fields, "body", Mapping))
        if wrong := [name for name in body if not isinstance(name, str)]:
            raise _LineError("invalid_type", f"'body' has a name that is no text: {shown(wrong[0])}", "body")
        if unknown := [name for name in fields if name not in FIELDS]:
            raise _LineError(
                "unknown_parameter",
                f"there is no field {shown(unknown[0])}; parameters of the request belong into 'body'",
                str(unknown[0])[:200],
            )
        return BatchRequest(_id(item), number, custom_id, url, body)


def refused(id: str, custom_id: str | None, code: str, message: str, param: str | None, number: int) -> BatchResult:
    """The result of a line that is no request, and so never ran."""
    error = {"code": code, "message": message, "param": param, "line": number}
    return {"id": id, "custom_id": custom_id, "response": None, "error": error}


def too_long(line: bytes, number: int, limit: int) -> BatchResult:
    """The result of a line that was not read to its end. line: its beginning."""
    message = f"Line {number}: the line is longer than {limit} bytes"
    return refused(_id(line, number), None, "line_too_long", message, None, number)


def _fields(item: Any) -> Mapping[Any, Any]:
    """The fields of a line's JSON object, or of a mapping."""
    if isinstance(item, (bytes, str)):
        try:
            item = json.loads(item, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:  # of bytes that are no UTF-8, too
            raise _LineError("invalid_json_line", f"the line is no JSON: {shown(str(error), 200)[1:-1]}") from None
    if not isinstance(item, Mapping):
        raise _LineError("invalid_json_line", f"a request is a JSON object, got {shown(item)}")
    return item


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


def _required(fields: Mapping[Any, Any], name: str, kind: type) -> Any:
    value = fields.get(name)
    if value is None:
        raise _LineError("missing_required_parameter", f"the field '{name}' is missing", name)
    if not isinstance(value, kind):
        what = "a string" if kind is str else "an object"
        raise _LineError("invalid_type", f"'{name}' must be {what}, got {shown(value)}", name)
    return value


def _id(item: Any, number: int | None = None) -> str:
    """Of a line 32 hexadecimal digits of the SHA-256 of its bytes, and of its number where one is given; else random."""
    if not isinstance(item, (bytes, str)):
        return ID_PREFIX + secrets.token_hex(16)
    line = item.encode("utf-8", "surrogatepass") if isinstance(item, str) else item
    hashed = hashlib.sha256(line.strip())
    if number is not None:
        hashed.update(f"\n{number}".encode())
    return ID_PREFIX + hashed.hexdigest()[:32]
