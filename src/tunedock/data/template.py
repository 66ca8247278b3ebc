"""The model's own Jinja template, in text: what stands before an answer, where the answer begins and where it ends.

The prompt of a turn is one function, `Template.prompt`: inference renders it, and training asks it for the text an answer must
continue. What a family's template does about thinking is found out once, from a rendered question and answer, not from its name:

    reasoning   field     the template reads `reasoning_content`                                     (Qwen3, GLM-4.5)
                inline    it shows the content as it is, so the reasoning is written into the content (Qwen2.5, Llama 3)
                opened    the generation prompt ends with `<think>` and the template drops what is thought: the answer
                          continues that prompt                                                       (DeepSeek-R1, QwQ)
    no reasoning          the prompt ends after the empty think block wherever the template writes one before an answer,
                          so the block is context and never learned

Earlier turns are rendered as the template renders history, whose thinking most templates drop.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from tunedock.data.conversation import Message, RowRefused, ToolCall
from tunedock.data.rendering import renderer
from tunedock.errors import ModelError

Tools = Sequence[dict[str, Any]]

Plain = Literal["off", "on", "unopened"]
"""The generation prompt of an answer without reasoning: thinking switched off, left on, or on less the `<think>` it opens."""

_QUESTION, _ANSWER, _REASONING = "Which probe is asked?", "This probe is answered.", "That probe is reasoned."
_EMPTY_THINK = re.compile(r"\s*(?:<think>)?\s*</think>\s*")
_OPEN_THINK = re.compile(r"<think>\s*\Z")
_WHERE = "model.chat_template"


@dataclass(frozen=True, slots=True)
class Turn:
    """A trained answer and the text it stands in. Positions are characters of `text`."""

    index: int
    """Of the message in the conversation."""
    text: str
    """The conversation rendered up to this turn; the prompt is `text[:start]`."""
    start: int
    end: int
    """After the stop token's text; the end of `text` when the template writes none."""
    stop_at: int | None
    """Where the stop token begins."""


class Template:
    """Renders conversations with the tokenizer's chat template. `stop_ids` may grow: turn ends the template writes join it.

    Raises ModelError when there is no template, or it cannot render a question and its answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_ids: Iterable[int]) -> None:
        if not tokenizer.chat_template:
            raise ModelError(
                "the tokenizer has no chat template, and none is made up",
                where=_WHERE,
                hint="name a Jinja file in `model.chat_template`, or take the model's instruct version",
            )
        self._text = renderer(tokenizer)
        added = tokenizer.added_tokens_decoder
        self.stop_ids = set(stop_ids)
        self._special = {t.content: i for i, t in added.items() if t.special or i in self.stop_ids}
        self._special_texts = tuple(sorted((text for text in self._special if text), key=len, reverse=True))
        try:
            self._plain, self._empty_think = self._probe_plain()
            self.reasoning = self._probe_reasoning()
            self._join_turn_end()
        except RowRefused as refused:
            raise ModelError(
                f"the chat template cannot render a question and its answer: {refused.detail}",
                where=_WHERE,
                hint="give a template that can in `model.chat_template`",
            ) from None

    # -- what the template does ---------------------------------------------------------------------------------------

    def _probe_plain(self) -> tuple[Plain, str]:
        """Which generation prompt a plain answer continues, and the empty think block that stands after it."""
        asked = (Message("user", _QUESTION),)
        candidates: tuple[tuple[Plain, bool], ...] = (("off", False), ("on", True))
        for name, thinking in candidates:
            prompt = self._render(asked, (), thinking=thinking, generation=True)
            text = self._render((*asked, Message("assistant", _ANSWER)), (), thinking=thinking)
            if text.startswith(prompt):
                before = text[len(prompt) : max(text.find(_ANSWER, len(prompt)), len(prompt))]
                return name, before if _EMPTY_THINK.fullmatch(before) else ""
        return "unopened", ""

    def _probe_reasoning(self) -> Literal["field", "inline", "opened", "none"]:
        asked = (Message("user", _QUESTION),)
        answer = Message("assistant", _ANSWER, reasoning=_REASONING)
        if _REASONING in self._render((*asked, answer), (), thinking=True):
            return "field"
        if _REASONING in self._render((*asked, _inlined(answer)), (), thinking=True):
            return "inline"
        return "opened" if _OPEN_THINK.search(self._render(asked, (), thinking=True, generation=True)) else "none"

    def _join_turn_end(self) -> None:
        """The stop of an answer that is followed by another turn: a base model's eos is often not its template's turn end."""
        turn = (Message("user", _QUESTION), Message("assistant", _ANSWER))
        alone = self._render(turn, (), thinking=False)
        followed = self._render((*turn, *turn), (), thinking=False)
        end, history_end = (text.find(_ANSWER) + len(_ANSWER) for text in (alone, followed))
        closing = self._closing(alone, end)
        shared = [text for at, text in closing if followed.startswith(alone[end : at + len(text)], history_end)]
        if shared and not any(self._special[text] in self.stop_ids for text in shared):
            self.stop_ids.add(self._special[shared[0]])

    @cached_property
    def _arguments_as_text(self) -> bool:
        """Whether a tool call's arguments must be a JSON string (DeepSeek); transformers' convention is an object."""
        call = Message("assistant", "", tool_calls=(ToolCall("probe", {"a": 1}, "call_0"),))
        for as_text in (False, True):
            messages = [{"role": "user", "content": _QUESTION}, _plain_message(call, arguments_as_text=as_text)]
            try:
                self._apply(messages, (), thinking=False, generation=False)
            except RowRefused:
                continue
            return as_text
        return False

    def engine_renders(self, *, thinking: bool) -> bool:
        """Whether an engine that applies the template with `add_generation_prompt` and `enable_thinking=thinking` gets `prompt`.

        Not so for plain answers where the template opens a `<think>` whatever it is told.
        """
        return thinking or (self._plain == "off" and not self._empty_think)

    # -- rendering ----------------------------------------------------------------------------------------------------

    def prompt(self, messages: Sequence[Message], tools: Tools = (), *, thinking: bool) -> str:
        """The text an answer to `messages` continues. Raises RowRefused when the template refuses the messages."""
        if thinking:
            return self._render(messages, tools, thinking=True, generation=True)
        text = self._render(messages, tools, thinking=self._plain == "on", generation=True)
        return (_OPEN_THINK.sub("", text) if self._plain == "unopened" else text) + self._empty_think

    def turn(self, messages: Sequence[Message], tools: Tools = ()) -> Turn:
        """The last of `messages`, an assistant turn, as an answer. Raises RowRefused when it does not continue its prompt."""
        *before, answer = messages
        thinking = answer.reasoning is not None
        prompt = self.prompt(before, tools, thinking=thinking)
        text = self._answered(before, answer, tools, prompt)
        if not text.startswith(prompt):
            raise RowRefused("prompt_not_prefix", _apart(prompt, text, len(before)))
        reasoning = (answer.reasoning or "").strip()
        if reasoning and reasoning not in text[len(prompt) :]:
            raise RowRefused("template_refused", f"turn {len(before)}: the chat template leaves the reasoning out")
        if any(call.name not in text[len(prompt) :] for call in answer.tool_calls):
            raise RowRefused("template_refused", f"turn {len(before)}: the chat template leaves the tool call out")
        end, stop_at = self._end(text, len(prompt))
        return Turn(len(before), text, len(prompt), end, stop_at)

    def header_at(self, messages: Sequence[Message], tools: Tools, prompt: str, *, thinking: bool) -> int:
        """Where the generation header (what `add_generation_prompt` adds) begins in the prompt that answers `messages`."""
        return _shared(prompt, self._render(messages, tools, thinking=thinking or self._plain == "on"))

    def stop_text_at(self, text: str, at: int) -> str | None:
        """The stop token that stands at a place of a rendering."""
        found = next((token for token in self._special_texts if text.startswith(token, at)), None)
        return found if found is not None and self._special[found] in self.stop_ids else None

    def _answered(self, before: Sequence[Message], answer: Message, tools: Tools, prompt: str) -> str:
        """The rendering up to the answer, with its reasoning the way this template can show it."""
        thinking = answer.reasoning is not None
        if thinking and self.reasoning == "inline":
            answer = _inlined(answer)
        text = self._render((*before, answer), tools, thinking=thinking or self._plain == "on")
        unopened = _OPEN_THINK.sub("", prompt)
        if thinking and self.reasoning == "opened" and text.startswith(unopened) and unopened != prompt:
            return f"{prompt}{(answer.reasoning or '').strip()}\n</think>\n\n{text[len(unopened) :].lstrip()}"
        return text

    def _end(self, text: str, start: int) -> tuple[int, int | None]:
        closing = self._closing(text, start)
        if not closing:
            return len(text), None
        at, stop = next((end for end in closing if self._special[end[1]] in self.stop_ids), closing[0])
        self.stop_ids.add(self._special[stop])
        return at + len(stop), at

    def _closing(self, text: str, start: int) -> list[tuple[int, str]]:
        """Special tokens after the last ordinary text, in order, each with its place; whitespace between them is passed over."""
        found: list[tuple[int, str]] = []
        end = len(text)
        while True:
            while end > start and text[end - 1].isspace():
                end -= 1
            token = next((t for t in self._special_texts if text.endswith(t, start, end)), None)
            if token is None:
                return found[::-1]
            end -= len(token)
            found.append((end, token))

    def _render(self, messages: Sequence[Message], tools: Tools, *, thinking: bool, generation: bool = False) -> str:
        as_text = any(m.tool_calls for m in messages) and self._arguments_as_text
        dicts = [_plain_message(message, arguments_as_text=as_text) for message in messages]
        return self._apply(dicts, tools, thinking=thinking, generation=generation)

    def _apply(self, messages: list[dict[str, Any]], tools: Tools, *, thinking: bool, generation: bool) -> str:
        try:
            # `thinking` is what DeepSeek-V3.1 and Granite call it.
            return self._text(messages, tools, generation=generation, enable_thinking=thinking, thinking=thinking)
        except Exception as error:  # policy: a template is code that came with the model; what it raises is its verdict
            raise RowRefused("template_refused", str(error).strip() or type(error).__name__) from error


def _plain_message(message: Message, *, arguments_as_text: bool) -> dict[str, Any]:
    """A message as templates take it. Keys without a value are left out: templates ask whether a key is there."""
    plain: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning is None and not message.tool_calls and message.tool_call_id is message.name is None:
        return plain
    if message.reasoning is not None:
        plain["reasoning_content"] = message.reasoning
    if message.tool_calls:
        dump: Callable[[Any], Any] = _json if arguments_as_text else dict
        plain["tool_calls"] = [
            {
                "type": "function",
                **({"id": call.id} if call.id is not None else {}),
                "function": {"name": call.name, "arguments": dump(call.arguments)},
            }
            for call in message.tool_calls
        ]
    named = {"tool_call_id": message.tool_call_id, "name": message.name}
    return plain | {key: value for key, value in named.items() if value is not None}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _inlined(answer: Message) -> Message:
    content = f"<think>\n{(answer.reasoning or '').strip()}\n</think>\n\n{answer.content}"
    return Message("assistant", content, answer.weight, None, answer.tool_calls, answer.tool_call_id, answer.name)


def _shared(a: str, b: str) -> int:
    """Characters two texts begin with alike."""
    return len(os.path.commonprefix((a, b)))  # noqa: RUF071 - characters are meant


def _apart(prompt: str, text: str, index: int) -> str:
    at = _shared(prompt, text)
    return (
        f"turn {index}: the prompt the model is served with does not begin the rendering with the answer; from character {at} "
        f"the prompt has {prompt[at : at + 40]!r}, the rendering {text[at : at + 40]!r}"
    )
