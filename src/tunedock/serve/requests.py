"""Requests -> jobs: names and defaults settled, and what the engine of a model cannot do refused by the field that asks for it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tunedock.serve.body import checked, loads
from tunedock.serve.engines.generator import Sampling
from tunedock.serve.errors import invalid, unsupported
from tunedock.serve.jobs import ChatJob, Engine, TextJob
from tunedock.serve.surface import (
    Asked,
    Call,
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    Drawn,
    ResponsesRequest,
)

COLDEST = 1e-4
"""Temperatures below it are none: logits divided by one that float32 has no number for are none either."""
_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)


def chat_job(request: ChatRequest, engine: Engine, *, id_: str, model: str, adapter: str | None) -> ChatJob:
    """Raises ApiError for what the engine has not."""
    _refuse_common(request, engine)
    if request.max_tokens is not None and request.max_completion_tokens not in (None, request.max_tokens):
        raise invalid("`max_tokens` is the old name of `max_completion_tokens`: say one of them", "max_tokens")
    choice = request.tool_choice if request.tool_choice is not None else "auto"
    tools = request.tools or []
    if choice not in ("auto", "none") and not tools:
        raise invalid("`tool_choice` is only allowed when `tools` are specified", "tool_choice")
    if choice == "none":
        tools = []
    elif tools and "tools" not in engine.can:
        raise unsupported("calling tools", "tools")
    elif choice != "auto" and "tool_choice" not in engine.can:
        raise unsupported(f"`tool_choice: {_short(choice)}`, which forces a call,", "tool_choice")
    shape = request.response_format
    if shape is not None and shape.get("type") not in ("text", "json_object", "json_schema"):
        raise invalid("`response_format.type` is text, json_object or json_schema", "response_format")
    if shape is not None and shape["type"] != "text" and "response_format" not in engine.can:
        raise unsupported(f"`response_format: {shape['type']}`, which keeps answers to a form,", "response_format")
    if request.logprobs and "logprobs" not in engine.can:
        raise unsupported("telling likelihoods", "logprobs")
    if request.top_logprobs is not None and not request.logprobs:
        raise invalid("`top_logprobs` needs `logprobs: true`", "top_logprobs")
    return ChatJob(
        id=id_,
        model=model,
        adapter=adapter,
        max_tokens=request.max_completion_tokens or request.max_tokens,
        n=request.n or 1,
        stops=tuple(request.stops()),
        sampling=_sampling(request),
        given=_given(request),
        top_logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        messages=[_checked(message, index) for index, message in enumerate(request.messages)],
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=request.parallel_tool_calls is not False,
        response_format=None if shape is None or shape["type"] == "text" else shape,
        thinking=_thinking(request),
    )


def text_jobs(
    request: CompletionRequest, engine: Engine, *, id_: str, model: str, adapter: str | None
) -> list[TextJob]:
    """One for each prompt. Raises ApiError for what the engine has not."""
    if "completions" not in engine.can:
        raise unsupported("completing texts", "model")
    _refuse_common(request, engine)
    for name in ("echo", "suffix"):
        if getattr(request, name):
            raise unsupported(f"`{name}`", name)
    if request.best_of not in (None, request.n or 1):
        raise unsupported("choosing the best of several", "best_of")
    if request.logprobs is not None and "logprobs" not in engine.can:
        raise unsupported("telling likelihoods", "logprobs")
    return [
        TextJob(
            id=f"{id_}-{number}",
            model=model,
            adapter=adapter,
            max_tokens=request.max_tokens or 16,
            n=request.n or 1,
            stops=tuple(request.stops()),
            sampling=_sampling(request),
            given=_given(request),
            top_logprobs=request.logprobs,
            prompt=prompt,
        )
        for number, prompt in enumerate(request.prompts())
    ]


def as_chat(request: ResponsesRequest) -> ChatRequest:
    """A request for a response, as the chat it means. Raises ApiError for items and settings that a chat has not."""
    messages: list[dict[str, Any]] = []
    if request.instructions:
        messages.append({"role": "system", "content": request.instructions})
    if isinstance(request.input, str):
        messages.append({"role": "user", "content": request.input})
    else:
        for number, item in enumerate(request.input):
            _add_item(messages, item, f"input[{number}]")
    form: Mapping[str, Any] = (request.text.format if request.text else None) or {"type": "text"}
    if form.get("type") == "json_schema":  # the chat has its parts one deeper
        form = {"type": "json_schema", "json_schema": {key: value for key, value in form.items() if key != "type"}}
    effort = request.reasoning.effort if request.reasoning else None
    fields = {
        "model": request.model,
        "messages": messages,
        "max_completion_tokens": request.max_output_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "stream": request.stream,
        "tools": [_function_tool(tool, number) for number, tool in enumerate(request.tools or [])] or None,
        "tool_choice": _choice(request.tool_choice),
        "parallel_tool_calls": request.parallel_tool_calls,
        "response_format": form,
        "reasoning_effort": effort,
    }
    return checked({key: value for key, value in fields.items() if value is not None}, ChatRequest)


def _add_item(messages: list[dict[str, Any]], item: Mapping[str, Any], where: str) -> None:
    kind = item.get("type", "message")
    if kind == "message":
        messages.append({"role": item.get("role", "user"), "content": item.get("content")})
    elif kind == "function_call":
        call = {"id": item.get("call_id"), "function": {"name": item.get("name"), "arguments": item.get("arguments")}}
        last = messages[-1] if messages else {}
        if last.get("role") == "assistant":
            last.setdefault("tool_calls", []).append(call)
        else:
            messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
    elif kind == "function_call_output":
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")})
    elif kind != "reasoning":  # what was thought before is not shown to the model again
        raise invalid(f"an item of the type `{str(kind)[:100]}` is not supported", where)


def _function_tool(tool: Mapping[str, Any], number: int) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise invalid(f"tools of the type `{str(tool.get('type'))[:100]}` are not supported", f"tools[{number}].type")
    return {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}


def _choice(choice: str | Mapping[str, Any] | None) -> Any:
    if isinstance(choice, Mapping) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice


def _refuse_common(request: Asked, engine: Engine) -> None:
    if request.logit_bias:
        raise unsupported("`logit_bias`", "logit_bias")
    if (request.n or 1) > 1 and "n" not in engine.can:
        raise unsupported("several answers (`n`)", "n")
    if request.seed is not None and "seed" not in engine.can:
        raise unsupported("`seed`", "seed")


def _sampling(request: Drawn) -> Sampling:
    found = {name: getattr(request, name, None) for name in _SAMPLING}
    if found["top_k"] is not None and found["top_k"] <= 0:
        found["top_k"] = None  # vLLM's way to say: all
    if found["temperature"] is not None and found["temperature"] < COLDEST:
        found["temperature"] = 0.0
    return Sampling(**{name: value for name, value in found.items() if value is not None})


def _given(request: Drawn) -> frozenset[str]:
    return frozenset(name for name in _SAMPLING if getattr(request, name, None) is not None)


def _thinking(request: ChatRequest) -> bool | None:
    arguments = dict(request.chat_template_kwargs or {})
    wanted = arguments.pop("enable_thinking", arguments.pop("thinking", None))
    if arguments:
        raise unsupported(f"`chat_template_kwargs.{next(iter(arguments))[:100]}`", "chat_template_kwargs")
    if wanted is not None and not isinstance(wanted, bool):
        raise invalid("`enable_thinking` is true or false", "chat_template_kwargs")
    if wanted is None and request.reasoning_effort is not None:
        return request.reasoning_effort != "none"
    return wanted


def _checked(message: ChatMessage, index: int) -> ChatMessage:
    if message.role == "tool" and message.content is None:
        raise invalid("a tool's message needs `content`", f"messages[{index}].content")
    if message.role in ("system", "developer", "user") and message.content is None:
        raise invalid("`content` is missing", f"messages[{index}].content")
    if message.tool_calls and message.role != "assistant":
        raise invalid("only the assistant calls tools", f"messages[{index}].tool_calls")
    for number, call in enumerate(message.tool_calls or ()):
        arguments_of(call, f"messages[{index}].tool_calls[{number}].function.arguments")
    return message


def arguments_of(call: Call, where: str) -> dict[str, Any]:
    """A call's arguments as an object. Raises ApiError."""
    try:
        found = loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise invalid("the arguments of a call are a JSON object in text", where)
    return found


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:100]
