"""What is read from a client before it is believed: bounded in bytes, in depth, in time; then checked against its model."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from tunedock.serve.errors import ApiError, invalid

DEEPEST = 64
"""Arrays and objects inside one another."""
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_BRACKETS = re.compile(rb'"(?:[^"\\]|\\.|\\\Z)*+(?:"|\Z)|[\[{]|[\]}]', re.DOTALL)
"""A text (that without an end too, else each quote in it would be tried as its beginning), or a bracket."""
QUICK_BYTES = 128 << 10
"""Up to which a body is parsed on the spot: four megabytes of small objects take two seconds, and others want to be answered."""

SHARES = 4
"""A caller may have one of so many of the room for bodies."""

M = TypeVar("M", bound=BaseModel)


@dataclass(slots=True)
class Room:
    """Bytes that bodies of requests at work may have together: each alone may be large, a thousand at once may not.

    Nobody may have all of it: who sends many and slowly would keep the others out.
    """

    most: int
    taken: int = 0
    _by: dict[str, int] = field(default_factory=dict)

    def take(self, whom: str, count: int) -> None:
        """Raises ApiError: 429 where a caller has its share, 503 where there is no room left."""
        mine, again = self._by.get(whom, 0) + count, {"Retry-After": "1"}
        if mine > self.most // SHARES:
            raise ApiError(429, "you send too much at once", type_="requests", code="too_many_bytes", headers=again)
        if self.taken + count > self.most:
            said = "too much is being sent at once at the moment"
            raise ApiError(503, said, type_="server_error", code="too_many_bytes", headers=again)
        self.taken += count
        self._by[whom] = mine

    def give_back(self, whom: str, count: int) -> None:
        self.taken -= count
        left = self._by.pop(whom, 0) - count
        if left > 0:
            self._by[whom] = left


async def read(request: Request, take: Callable[[int], None], *, most_bytes: int, limit_s: float) -> Any:
    """The JSON of a request's body. `take` is called with each piece's bytes. Raises ApiError, and what `take` raises."""
    said = request.headers.get("content-length", "")
    if said.isdecimal() and int(said) > most_bytes:
        raise _too_large(most_bytes)
    _require_json(request)
    data = bytearray()
    try:
        async with asyncio.timeout(limit_s):
            async for piece in request.stream():
                take(len(piece))
                data += piece
                if len(data) > most_bytes:
                    raise _too_large(most_bytes)
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {limit_s:.0f} s", headers={"Connection": "close"}) from None
    except ClientDisconnect:
        raise ApiError(499, "the client went away", code="client_closed_request") from None
    return parse(bytes(data)) if len(data) <= QUICK_BYTES else await asyncio.to_thread(parse, bytes(data))


def _require_json(request: Request) -> None:
    """Raises ApiError (415) for what says of itself that it is something else, compressed, or several things."""
    packed = request.headers.get("content-encoding", "identity").strip().lower()
    if packed != "identity":
        raise ApiError(415, f"the body is compressed (`{packed[:100]}`), and this endpoint reads it as it is")
    kinds = request.headers.getlist("content-type") or ["application/json"]
    if len(kinds) > 1 or not _is_json(kinds[0]):
        kind = ", ".join(kinds)[:100]
        raise ApiError(415, f"the body is `{kind}`, and this endpoint reads application/json in UTF-8")


def _is_json(kind: str) -> bool:
    name, *parameters = kind.lower().split(";")
    named = (text.partition("=") for text in parameters)
    encodings = {value.strip(' "\t') for key, _, value in named if key.strip() == "charset"}
    return name.strip() == "application/json" and encodings <= {"utf-8", "utf8"}


def _too_large(most_bytes: int) -> ApiError:
    return ApiError(413, f"the body is larger than {most_bytes:,} bytes", code="request_too_large")


def parse(data: bytes) -> Any:
    """Raises ApiError for what is no JSON, or nested without measure."""
    depth = 0
    for found in _BRACKETS.finditer(data):
        depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(found[0], 0)
        if depth > DEEPEST:
            raise invalid(f"the body is nested deeper than {DEEPEST} levels")
    try:
        return loads(data.decode("utf-8"))
    except UnicodeDecodeError:
        raise invalid("the body is not UTF-8") from None
    except UnicodeEncodeError:
        raise invalid(
            "the body holds half a character (a lone surrogate, `\\ud800` to `\\udfff`): not unicode"
        ) from None
    except (ValueError, RecursionError):
        raise invalid("the body is not JSON, or a number in it is beyond all measure") from None


def loads(text: str) -> Any:
    """JSON that can be written again: halves of characters and numbers without end would fail where they are, much later.

    Raises ValueError, RecursionError.
    """
    value = json.loads(text, parse_constant=_no_number, parse_float=_finite)
    if _SURROGATE.search(text):  # of a pair a character was made; of one alone nothing is
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _no_number(text: str) -> float:
    raise ValueError(text)


def _finite(text: str) -> float:
    found = float(text)
    return found if math.isfinite(found) else _no_number(text)


def checked(value: Any, kind: type[M]) -> M:
    """A request of its kind. Raises ApiError that names the field."""
    if not isinstance(value, dict):
        raise invalid("the body is not a JSON object", None)
    # Each would be an error of its own: of hundreds of thousands only one is told.
    unknown = next((key for key in value if key not in kind.model_fields), None)
    if unknown is not None:
        raise invalid(*_unknown(unknown if unknown.isidentifier() else ""))
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise invalid(*_first(error)) from None


def _unknown(place: str) -> tuple[str, str | None]:
    return f"Unknown parameter: `{place[:200]}`", place[:200] or None


def _first(error: ValidationError) -> tuple[str, str | None]:
    """(message, field) of the first problem. Of a union's branches, that which got furthest is meant."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    deepest = max(problems, key=lambda problem: len(problem["loc"])) if problems else None
    first = problems[0]
    chosen = first if deepest is None or first["type"] in ("missing", "extra_forbidden") else deepest
    place = ""
    for part in chosen["loc"]:
        if isinstance(part, int):
            place += f"[{part}]"
        elif part.isidentifier():
            place += f".{part}" if place else part
    if chosen["type"] == "extra_forbidden":
        return _unknown(place)
    if chosen["type"] == "missing":
        return f"Missing required parameter: `{place[:200]}`", place[:200] or None
    return f"`{place[:200]}`: {chosen['msg'][:500]}", place[:200] or None
