"""Errors as OpenAI's clients know them: `{"error": {"message", "type", "param", "code"}}`, with a status they act by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class ApiError(Exception):
    """An answer that is an error. What the client did wrong, or what we cannot do for now."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type_: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type_
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def unsupported(what: str, param: str) -> ApiError:
    """A thing of OpenAI's interface that the engine behind the model has not: said, never left out."""
    return ApiError(
        400, f"{what} is not supported by the engine of this model", param=param, code="unsupported_parameter"
    )


def no_model(name: str) -> ApiError:
    return ApiError(404, f"The model `{name[:200]}` does not exist", param="model", code="model_not_found")


def too_long(prompt: int, longest: int, *, at_least: bool = False) -> ApiError:
    return ApiError(
        400,
        f"This model's maximum context length is {longest} tokens. However, your messages resulted in "
        f"{'at least ' if at_least else ''}{prompt} tokens. "
        "Please reduce the length of the messages.",
        param="messages",
        code="context_length_exceeded",
    )


def unavailable(message: str, retry_s: float = 1.0) -> ApiError:
    return ApiError(
        503,
        message,
        type_="server_error",
        code="engine_unavailable",
        headers={"Retry-After": str(max(1, round(retry_s)))},
    )
