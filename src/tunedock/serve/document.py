"""The gateway in OpenAPI's words: what may be sent, by the models that check it; what comes back, in OpenAI's shapes.

It is served at no path: what it tells, a caller may know, and a stranger need not. Tests hold it against the gateway.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from tunedock import __version__
from tunedock.serve.surface import ChatRequest, CompletionRequest, EmbeddingRequest, ResponsesRequest

Json = dict[str, Any]

OPENAPI = "3.1.0"
REFUSED: Mapping[int, str] = {
    400: "The request is not understood, or asks for what the model's engine has not",
    401: "No key or token, or none that is valid",
    403: "The caller may not use this model; or the gateway is open and was called by a name that is not its own",
    404: "There is no such model",
    408: "The body did not come in time",
    413: "The body is too large",
    415: "The body is not JSON",
    429: "A limit of the caller, or of the engine",
    500: "A fault of the gateway",
    502: "The engine answered in a way that is none",
    503: "The engine or the store of keys cannot be asked at the moment",
    504: "The answer took too long",
}
_NO_BODY = (400, 401, 403, 404, 429, 500, 503)


def document() -> Json:
    """The whole document. A new one each time."""
    schemas: Json = {"Error": _ERROR, **_ANSWERS}
    paths: Json = {}
    for path, kind, answer, streams, says in (
        ("/v1/chat/completions", ChatRequest, "ChatCompletion", True, "Answer a conversation"),
        ("/v1/completions", CompletionRequest, "Completion", True, "Go on with a text"),
        ("/v1/responses", ResponsesRequest, "Response", True, "Answer a conversation, in the newer interface"),
        ("/v1/embeddings", EmbeddingRequest, "Embeddings", False, "Texts as vectors"),
    ):
        body = {"required": True, "content": {"application/json": {"schema": _request(kind, schemas)}}}
        told: Json = {"application/json": {"schema": _ref(answer)}}
        if streams:
            told["text/event-stream"] = {"schema": _EVENT}
        paths[path] = {"post": _operation(says, told, REFUSED) | {"requestBody": body}}
    paths["/v1/models"] = {"get": _operation("Models the caller may use", _json(_ref("Models")), _NO_BODY)}
    name: Json = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    paths["/v1/models/{name}"] = {
        "get": _operation("One of them", _json(_ref("Model")), _NO_BODY) | {"parameters": [name]}
    }
    text: Json = {"text/plain": {"schema": {"type": "string"}}}
    paths["/metrics"] = {"get": _operation("Figures for Prometheus", text, _NO_BODY)}
    paths["/health"] = {"get": {"summary": "Live: the process answers", "security": [], "responses": _open("Health")}}
    ready = _open("Ready") | {"503": {"description": "Not ready, or ending", "content": _json(_ref("Ready"))}}
    paths["/ready"] = {
        "get": {"summary": "Whether the next request would be answered", "security": [], "responses": ready}
    }
    return {
        "openapi": OPENAPI,
        "info": {"title": "tunedock", "version": __version__},
        "paths": paths,
        "security": [{"bearer": []}],
        "components": {"schemas": schemas, "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}}},
    }


def _request(kind: type[BaseModel], schemas: Json) -> Json:
    """A request's schema by reference; those it is made of beside it."""
    found = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas |= found.pop("$defs", {})
    schemas[kind.__name__] = found
    return _ref(kind.__name__)


def _operation(says: str, told: Json, refused: Mapping[int, str] | tuple[int, ...]) -> Json:
    errors = {str(code): {"description": REFUSED[code], "content": _json(_ref("Error"))} for code in refused}
    return {"summary": says, "responses": {"200": {"description": "The answer", "content": told}} | errors}


def _open(name: str) -> Json:
    return {"200": {"description": "Yes", "content": _json(_ref(name))}}


def _json(schema: Json) -> Json:
    return {"application/json": {"schema": schema}}


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


# -- what comes back -----------------------------------------------------------------------------------------------------


def _object(required: Json, optional: Json | None = None, *, more: bool = False) -> Json:
    return {
        "type": "object",
        "properties": {**required, **(optional or {})},
        "required": list(required),
        "additionalProperties": more,
    }


def _list(items: Json) -> Json:
    return {"type": "array", "items": items}


def _or_null(schema: Json) -> Json:
    return {"anyOf": [schema, {"type": "null"}]}


_TEXT: Json = {"type": "string"}
_COUNT: Json = {"type": "integer", "minimum": 0}
_ANY: Json = {"type": "object"}
_EVENT = {
    "type": "object",
    "description": "An event of the stream; `data` is a piece of the answer as JSON, an error, or `[DONE]`",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}
_ERROR = _object(
    {"error": _object({"message": _TEXT, "type": _TEXT, "param": _or_null(_TEXT), "code": _or_null(_TEXT)})}
)
_USAGE = _object(
    {
        "prompt_tokens": _COUNT,
        "completion_tokens": _COUNT,
        "total_tokens": _COUNT,
        "prompt_tokens_details": _object({"cached_tokens": _COUNT}),
        "completion_tokens_details": _object({"reasoning_tokens": _COUNT}),
    }
)
_REASON: Json = {"enum": ["stop", "length", "tool_calls", "content_filter"]}
_CALL = _object({"id": _TEXT, "type": {"const": "function"}, "function": _object({"name": _TEXT, "arguments": _TEXT})})
_MESSAGE = _object(
    {"role": {"const": "assistant"}, "content": _or_null(_TEXT), "refusal": {"type": "null"}},
    {"reasoning": _TEXT, "reasoning_content": _TEXT, "tool_calls": _list(_CALL)},
)
_MODEL = _object(
    {"id": _TEXT, "object": {"const": "model"}, "created": _COUNT, "owned_by": _TEXT},
    {"version": _TEXT, "lineage": _ANY},
    more=True,
)


def _answer(kind: str, choice: Json) -> Json:
    head = {"id": _TEXT, "object": {"const": kind}, "created": _COUNT, "model": _TEXT, "system_fingerprint": _TEXT}
    return _object({**head, "choices": _list(_object({"index": _COUNT, **choice})), "usage": _USAGE})


_ANSWERS: Json = {
    "ChatCompletion": _answer(
        "chat.completion", {"message": _MESSAGE, "logprobs": _or_null(_ANY), "finish_reason": _REASON}
    ),
    "Completion": _answer("text_completion", {"text": _TEXT, "logprobs": _or_null(_ANY), "finish_reason": _REASON}),
    "Response": _object(
        {
            "id": _TEXT,
            "object": {"const": "response"},
            "created_at": _COUNT,
            "status": {"enum": ["completed", "incomplete"]},
            "error": {"type": "null"},
            "incomplete_details": _or_null(_ANY),
            "model": _TEXT,
            "output": _list(_ANY),
            "usage": _ANY,
        },
        more=True,
    ),
    "Embeddings": _object(
        {
            "object": {"const": "list"},
            "data": _list(
                _object(
                    {
                        "object": {"const": "embedding"},
                        "index": _COUNT,
                        "embedding": {"anyOf": [_list({"type": "number"}), _TEXT]},
                    }
                )
            ),
            "model": _TEXT,
            "usage": _object({"prompt_tokens": _COUNT, "total_tokens": _COUNT}),
        }
    ),
    "Model": _MODEL,
    "Models": _object({"object": {"const": "list"}, "data": _list(_MODEL)}),
    "Health": _object({"status": {"const": "ok"}}),
    "Ready": _object({"status": {"enum": ["ready", "not ready", "draining"]}}, {"models": {}, "access_store": _TEXT}),
}
