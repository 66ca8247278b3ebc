"""The model's own prompts, as text: what a template for another engine is held against.

`Render` is a function of OpenAI messages, the chat template beneath it. `own_render` makes one of a tokenizer whose prompts are
those a run was trained on (`data.template`), `Own` is what the rest of this package asks: it leaves out what the engine adds by
itself and finds out how the template wants a call's arguments.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from tunedock.data import rendering
from tunedock.data.conversation import Message, RowRefused, ToolCall
from tunedock.data.template import Template

Messages = Sequence[Mapping[str, Any]]
"""OpenAI's: role and content; reasoning_content, tool_calls (arguments as an object), tool_call_id and name where there are any."""
Tools = Sequence[Mapping[str, Any]]


class Render(Protocol):
    def __call__(self, messages: Messages, tools: Tools, *, add_generation_prompt: bool, enable_thinking: bool) -> str:
        """The text. Raises RowRefused where the template refuses the messages."""
        ...


def own_render(tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int]) -> Render:
    """Prompts exactly as training and serving have them. Raises ModelError when the tokenizer has no usable chat template."""
    prompts = Template(tokenizer, stop_ids)
    plainly = rendering.renderer(tokenizer)

    def render(messages: Messages, tools: Tools, *, add_generation_prompt: bool, enable_thinking: bool) -> str:
        dicts = [dict(tool) for tool in tools]
        if add_generation_prompt:
            return prompts.prompt([_message(message) for message in messages], dicts, thinking=enable_thinking)
        try:
            return plainly(
                [dict(message) for message in messages],
                dicts,
                generation=False,
                enable_thinking=enable_thinking,
                thinking=enable_thinking,
            )
        except Exception as error:  # policy: a template is code that came with the model; what it raises is its verdict
            raise RowRefused("template_refused", str(error).strip() or type(error).__name__) from error

    return render


def _message(message: Mapping[str, Any]) -> Message:
    calls = tuple(
        ToolCall(call["function"]["name"], _arguments(call["function"]["arguments"]), call.get("id"))
        for call in message.get("tool_calls") or ()
    )
    return Message(
        message["role"],
        message["content"],
        None,
        message.get("reasoning_content"),
        calls,
        message.get("tool_call_id"),
        message.get("name"),
    )


def _arguments(value: Any) -> dict[str, Any]:
    return dict(json.loads(value) if isinstance(value, str) else value)


class Own:
    """The model's prompts, less the text of the token the engine puts before each (`bos`)."""

    def __init__(self, render: Render, bos: str) -> None:
        self.render = render
        self.bos = bos
        self.arguments_as_text = False
        """Whether the template takes a call's arguments as JSON text only."""

    def prompt(self, messages: Messages, tools: Tools = (), *, thinking: bool) -> str:
        return self._text(messages, tools, add_generation_prompt=True, enable_thinking=thinking)

    def whole(self, messages: Messages, *, thinking: bool) -> str:
        """Without the generation prompt."""
        return self._text(messages, (), add_generation_prompt=False, enable_thinking=thinking)

    def tried(self, messages: Messages, tools: Tools = (), *, thinking: bool) -> str | None:
        """`prompt`, or None where the template refuses."""
        try:
            return self.prompt(messages, tools, thinking=thinking)
        except RowRefused:
            return None

    def _text(self, messages: Messages, tools: Tools, **switches: bool) -> str:
        if not self.arguments_as_text:
            try:
                return self.render(messages, tools, **switches).removeprefix(self.bos)
            except RowRefused:
                if not any(message.get("tool_calls") for message in messages):
                    raise
        text = self.render([_with_text(message) for message in messages], tools, **switches).removeprefix(self.bos)
        self.arguments_as_text = True
        return text


def _with_text(message: Mapping[str, Any]) -> dict[str, Any]:
    if not message.get("tool_calls"):
        return dict(message)
    calls = []
    for call in message["tool_calls"]:
        function = call["function"]
        arguments = function["arguments"]
        as_text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        calls.append({**call, "function": {**function, "arguments": as_text}})
    return {**message, "tool_calls": calls}
