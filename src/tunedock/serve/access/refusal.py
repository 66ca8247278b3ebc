"""What a caller is told who may not enter, in the shape and with the headers that OpenAI's clients obey.

`openai` tries 408, 409, 429 and 5xx again, waits for `Retry-After` up to 120 s, and obeys `x-should-retry`: so a limit of a minute
says when it will be free, and what no waiting mends says that no retry helps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tunedock.serve.access.admission import Refusal, Window

RETRY_STORE_S = 1


class Refused(Exception):  # noqa: N818 - an answer, not a mistake
    """An answer in place of the model's: an HTTP status, OpenAI's four fields, headers."""

    def __init__(
        self,
        status: int,
        type: str,
        code: str,
        message: str,
        headers: Mapping[str, str] | None = None,
        *,
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.type = type
        self.code = code
        self.message = message
        self.param = param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def unauthorized(reason: str) -> Refused:
    """401. The reason says what to mend, and nothing of what we know."""
    message = f"{reason}. Send an API key or a token as `Authorization: Bearer ...`."
    return Refused(401, "invalid_request_error", "invalid_api_key", message, {"WWW-Authenticate": "Bearer"})


def model_not_allowed(model: str) -> Refused:
    message = f"You may not use the model `{model}`; /v1/models lists those you may."
    return Refused(403, "permission_error", "model_not_allowed", message, param="model")


def store_unavailable() -> Refused:
    return Refused(
        503,
        "server_error",
        "access_store_unavailable",
        "Who may call cannot be looked up at the moment, so nobody is let in. Try again.",
        {"Retry-After": str(RETRY_STORE_S)},
    )


def keys_unavailable() -> Refused:
    return Refused(
        503,
        "server_error",
        "token_keys_unavailable",
        "The keys that tokens are checked by cannot be fetched at the moment. Try again, or use an API key.",
        {"Retry-After": "5"},
    )


def limited(refusal: Refusal, window: Window) -> Refused:
    """429, by the limit that was met."""
    headers = limit_headers(window)
    if refusal.retry_s is None:
        headers["x-should-retry"] = "false"
    else:
        headers["Retry-After"] = str(max(1, math.ceil(refusal.retry_s)))
    if refusal.limit == "tokens_per_day":
        return Refused(429, "insufficient_quota", "insufficient_quota", refusal.message, headers)
    kind = "tokens" if refusal.limit == "tokens_per_minute" else "requests"
    return Refused(429, kind, "rate_limit_exceeded", refusal.message, headers)


def limit_headers(window: Window) -> dict[str, str]:
    """`x-ratelimit-*` of the limits that there are, for answers of every kind."""
    headers = {}
    for name, gauge in (("requests", window.requests), ("tokens", window.tokens)):
        if gauge is not None:
            headers[f"x-ratelimit-limit-{name}"] = str(gauge.limit)
            headers[f"x-ratelimit-remaining-{name}"] = str(max(0, gauge.limit - gauge.used))
            headers[f"x-ratelimit-reset-{name}"] = f"{math.ceil(gauge.reset_s)}s"
    return headers
