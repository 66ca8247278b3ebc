"""Chat templates of random texts: whatever stands around turns, calls, results and reasoning, Ollama's template says it too."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tunedock.data.conversation import RowRefused
from tunedock.export.ollama.compare import compare, require
from tunedock.export.ollama.derive import derive
from tunedock.export.ollama.own import Render

PIECES = [
    "<u>",
    "</u>",
    "\n",
    " ",
    "{{",
    "{",
    "}}",
    "{{-",
    '"""',
    "word",
    "\u00a0",
    "中",
    "\r\n",
    "<think>\n\n</think>\n\n",
]
AROUND = st.lists(st.sampled_from(PIECES), max_size=3).map("".join)

PLACES = (
    "first", "before system", "after system", "before tools", "between tools", "after tools", "before user", "after user",
    "after user, off", "before answer", "no reasoning", "before reasoning", "after reasoning", "after text", "before calls",
    "before name", "after name", "after arguments", "between calls", "after calls", "after answer", "before results",
    "before result", "after result", "after results", "header", "header, off",
)  # fmt: skip


def template(at: Mapping[str, str], *, keeps_text: bool, joins_results: bool, dump: Callable[[Any], str]) -> Render:
    """`at` holds the texts at PLACES. `keeps_text`: words and reasoning are shown beside calls."""

    def answer(message: Mapping[str, Any], *, last: bool) -> str:
        text = at["before answer"]
        calls, reasoning = message.get("tool_calls"), message.get("reasoning_content")
        if last and keeps_text:
            text += reasoning.join((at["before reasoning"], at["after reasoning"])) if reasoning else at["no reasoning"]
        if not calls or keeps_text:
            text += message["content"]
        if calls:
            text += at["after text"] if message["content"] and keeps_text else ""
            told = [
                at["before name"] + call["function"]["name"] + at["after name"] + dump(call["function"]["arguments"])
                for call in calls
            ]
            text += "<call>" + at["before calls"]
            text += at["between calls"].join(one + at["after arguments"] for one in told) + at["after calls"]
        return text + at["after answer"]

    def result(messages: Sequence[Mapping[str, Any]], i: int) -> str:
        roles = [message["role"] for message in messages]
        opens = not joins_results or i == 0 or roles[i - 1] != "tool"
        closes = not joins_results or roles[i + 1 : i + 2] != ["tool"]
        text = at["before result"] + messages[i]["content"] + at["after result"]
        return ("<row>" + at["before results"] if opens else "") + text + (at["after results"] if closes else "")

    def render(
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        enable_thinking: bool,
    ) -> str:
        text, rest, off = at["first"], list(messages), "" if enable_thinking else ", off"
        if rest[0]["role"] == "system":
            text += rest.pop(0)["content"].join((at["before system"], at["after system"]))
        if tools:
            text += "<tools>" + at["before tools"]
            text += at["between tools"].join(json.dumps(tool) for tool in tools) + at["after tools"]
        last = max((i for i, message in enumerate(rest) if message["role"] == "user"), default=-1)
        for i, message in enumerate(rest):
            if message["role"] == "system":
                raise RowRefused("template_refused", "a system message is the first")
            if message["role"] == "user":
                text += at["before user"] + message["content"] + at["after user" + off]
            else:
                text += answer(message, last=i > last) if message["role"] == "assistant" else result(rest, i)
        return text + (at["header" + off] if add_generation_prompt else "")

    return render


@given(st.fixed_dictionaries(dict.fromkeys(PLACES, AROUND)), st.booleans(), st.booleans(), st.booleans())
def test_any_template_is_said_but_for_blanks_in_json(
    at: dict[str, str], keeps_text: bool, joins_results: bool, spaced: bool
) -> None:
    def dump(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False, separators=None if spaced else (",", ":"))

    render = template(at, keeps_text=keeps_text, joins_results=joins_results, dump=dump)
    derived = derive(render)
    comparison = compare(derived, render)
    require(comparison)
    assert derived.tools
    assert not derived.notes
    assert {v.status for v in comparison.verdicts if v.kind != "edge"} <= {"identical", "json"}, derived.template
