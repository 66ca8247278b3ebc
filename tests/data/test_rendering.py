"""The fast renderer is `apply_chat_template`: same text, same refusals, same sandbox."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
from jinja2.exceptions import SecurityError

from families import FAMILIES, tokenizer
from tunedock.data.rendering import renderer

CONTENTS = [
    "hello",
    " spaces around ",
    "<tool_response>x</tool_response>",
    "<think>a</think>b",
    "</think>",
    "",
    "你好\n",
    "{{ 1 }}",
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"b": {"type": "int"}, "a": {}}}}]


def message_of(draw: random.Random, role: str) -> dict[str, Any]:
    message: dict[str, Any] = {"role": role, "content": draw.choice(CONTENTS)}
    if role == "assistant" and draw.random() < 0.3:
        message["reasoning_content"] = "thought"
    if role == "assistant" and draw.random() < 0.3:
        call = {"name": "add", "arguments": {"b": 1, "a": "二"}}
        message["tool_calls"] = [{"type": "function", "id": "123456789", "function": call}]
    return message


def outcome(render: Any, *args: Any, **switches: Any) -> Any:
    try:
        return render(*args, **switches)
    except Exception as error:  # noqa: BLE001 - whatever a template raises is compared
        return type(error), str(error)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_renders_as_transformers_does(family: str) -> None:
    words = tokenizer(family)
    render = renderer(words)
    assert render.__name__ == "ours"
    draw = random.Random(family)
    for _ in range(150):
        roles = draw.choices(["user", "assistant", "tool", "system"], [4, 4, 1, 1], k=draw.randint(0, 6))
        messages = [message_of(draw, role) for role in roles]
        tools = TOOLS if draw.random() < 0.3 else []
        thinking, generation = draw.random() < 0.5, draw.random() < 0.5
        switches = {"enable_thinking": thinking, "thinking": thinking}
        before = copy.deepcopy(messages)
        expected = outcome(
            words.apply_chat_template,
            messages,
            tools=tools or None,
            add_generation_prompt=generation,
            tokenize=False,
            **switches,
        )
        assert outcome(render, messages, tools, generation=generation, **switches) == expected
        assert messages == before


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages[0].__class__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'a': 1}) }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ ('a'.format).__self__ }}",
        "{% for m in messages %}{{ loop.__class__ }}{{ loop._length }}{% endfor %}",
        "{% set ns = namespace(a=1) %}{{ ns.__class__ }}{{ ns._Namespace__attrs }}",
        "{{ raise_exception.__globals__ }}",
        "{{ messages[0].content.format_map }}{{ '{a.__class__}'.format_map({'a': 1}) }}",
    ],
)
def test_what_the_sandbox_forbids_stays_forbidden(attack: str) -> None:
    words = copy.copy(tokenizer("chatml"))
    words.chat_template = "{% if messages[0].content == 'attack' %}" + attack + "{% endif %}{{ messages[0].role }}"
    render = renderer(words)
    assert render.__name__ == "ours"
    messages = [{"role": "user", "content": "attack"}]
    expected = outcome(words.apply_chat_template, messages, tokenize=False)
    found = outcome(render, messages, generation=False)
    assert expected[0] is SecurityError or "__class__" not in str(found)
    assert (found[0] if isinstance(found, tuple) else found) == (
        expected[0] if isinstance(expected, tuple) else expected
    )
