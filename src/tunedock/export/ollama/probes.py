"""Conversations asked of the model's own chat template and of the template made for Ollama.

plain      what every chat sends: both must say the same to the letter
tools      tools, calls and their results
thinking   reasoning in earlier and in last turns, thinking asked for and switched off
edge       what one of both may be unable to say: blanks around texts, empty texts, roles in a row, schemas Ollama cuts
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["plain", "tools", "thinking", "edge"]
_Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Probe:
    name: str
    kind: Kind
    messages: tuple[_Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    think: bool | None = None
    """What the request says of thinking; None where it says nothing."""


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(
    content: str, *calls: tuple[str, Mapping[str, Any]], reasoning: str | None = None, first_id: int = 0
) -> dict[str, Any]:
    """`calls`: names and arguments; their ids count from `first_id`."""
    turn: dict[str, Any] = {"role": "assistant", "content": content}
    if reasoning is not None:
        turn["reasoning_content"] = reasoning
    if calls:
        turn["tool_calls"] = [
            {
                "id": f"call_{first_id + at}",
                "type": "function",
                "function": {"name": name, "arguments": dict(arguments)},
            }
            for at, (name, arguments) in enumerate(calls)
        ]
    return turn


def result(content: str, name: str, call_id: int = 0) -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": f"call_{call_id}", "name": name}


def function(name: str, description: str, **properties: Mapping[str, Any]) -> dict[str, Any]:
    """A tool whose properties are all required, its keys in the order Ollama writes them."""
    schema = {"type": "object", "required": list(properties), "properties": dict(properties)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


WEATHER = function(
    "get_weather",
    "The weather of a city, now.",
    city={"type": "string", "description": "Its name"},
    unit={"type": "string", "description": "Of the temperature", "enum": ["celsius", "fahrenheit"]},
)
CLOCK = function("get_time", "The time in a zone.", zone={"type": "string", "description": "As IANA names it"})
DEEP: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "book",
        "description": "Books a table, for < 9 people & their dogs.",
        "parameters": {
            "type": "object",
            "properties": {
                "when": {"type": "string", "format": "date-time"},
                "guests": {"type": "array", "items": {"type": "object", "properties": {"name": {"type": "string"}}}},
            },
            "required": ["when"],
            "additionalProperties": False,
        },
    },
}
_PARIS = ("get_weather", {"city": "Paris", "unit": "celsius"})
_TOKYO = ("get_weather", {"city": "東京", "unit": "celsius"})
_ZONE = ("get_time", {"zone": "Asia/Tokyo"})

_TALK = (user("What is a prime number?"), assistant("One with two divisors."), user("Name three."))
_LONG_TALK = (*_TALK, assistant("2, 3 and 5."), user("And the next?"), assistant("7."), user("Is 1 prime?"))
_ASKED = user("How warm is it in Paris?")
_CALLED = (_ASKED, assistant("", _PARIS), result('{"celsius": 21}', "get_weather"))
_ODD = (
    user("Line one\nline two\n\n```go\n{{ .Content }} {% raw %} ${x} `y` \"z\" 'w' \\n\n```"),
    assistant("好的：ß, é, 🙂 — {{- end }} }} {{"),
    user("a\tb  c {}"),
)

_BOTH = (WEATHER, CLOCK)

PROBES: tuple[Probe, ...] = (
    Probe("one turn", "plain", (user("What is a prime number?"),)),
    Probe("three turns", "plain", _TALK),
    Probe("many turns", "plain", _LONG_TALK),
    Probe("system", "plain", (system("Answer in one sentence."), *_TALK)),
    Probe("system of several lines", "plain", (system("Be brief.\n\nNever guess: say so."), user("Who won?"))),
    Probe("odd texts", "plain", _ODD),
    Probe("odd system", "plain", (system("用中文回答。{{ .System }} \"quoted\" <b>&amp;</b>"), user("开始 <|x|>"))),
    Probe("one tool", "tools", (_ASKED,), (WEATHER,)),
    Probe("tools", "tools", (_ASKED,), _BOTH),
    Probe("system and tools", "tools", (system("Call tools where you can."), *_TALK), _BOTH),
    Probe("a call and its result", "tools", _CALLED, _BOTH),
    Probe("a call after words", "tools", (_ASKED, assistant("Let me look.", _PARIS), _CALLED[2]), _BOTH),
    Probe(
        "two calls",
        "tools",
        (_ASKED, assistant("", _TOKYO, _ZONE), result("18", "get_weather"), result("09:00", "get_time", 1)),
        _BOTH,
    ),
    Probe(
        "a call with numbers",
        "tools",
        (_ASKED, assistant("", ("rate", {"alike": ["a", 1.5], "sure": True, "whole": 3})), result("ok", "rate")),
        _BOTH,
    ),
    Probe("calls one after the other", "tools",
          (*_CALLED, assistant("", _ZONE, first_id=1), result("09:00", "get_time", 1)), _BOTH),
    Probe("after an answer", "tools", (*_CALLED, assistant("21 degrees."), user("And in Tokyo?")), _BOTH),
    Probe("thinking asked for", "thinking", _TALK, think=True),
    Probe("thinking switched off", "thinking", _TALK, think=False),
    Probe("thinking switched off, system", "thinking", (system("Be brief."), user("Why?")), think=False),
    Probe(
        "reasoning in earlier turns",
        "thinking",
        (_TALK[0], assistant("Two divisors.", reasoning="Recall the definition."), _TALK[2]),
        think=True,
    ),
    Probe("reasoning before a call", "thinking",
          (_ASKED, assistant("", _PARIS, reasoning="A tool knows."), _CALLED[2]), _BOTH, True),
    Probe("reasoning and words before a call", "thinking",
          (_ASKED, assistant("Let me look.", _PARIS, reasoning="A tool knows."), _CALLED[2]), _BOTH, True),
    Probe("a result, thinking switched off", "thinking", _CALLED, _BOTH, False),
    Probe("blanks around texts", "edge", (user(" Who?  "), assistant("\nI. "), user("You?\n"))),
    Probe("empty texts", "edge", (user(""), assistant(""), user("?"))),
    Probe("empty system", "edge", (system(""), user("Who?"))),
    Probe("two users in a row", "edge", (user("Who?"), user("And why?"))),
    Probe("a system message later", "edge", (*_TALK, assistant("2, 3, 5."), system("Be brief."), user("More?"))),
    Probe("a deep schema", "edge", (user("A table, please."),), (DEEP,)),
    Probe("markup in a result", "edge", (_ASKED, assistant("", _PARIS), result("<b>21 & sunny</b>", "get_weather")), _BOTH),
)  # fmt: skip
