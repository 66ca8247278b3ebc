"""Hypothesis strategies of examples as `formats.parse` gives them: every kind, with odd text, calls, reasoning, marks and names."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from tunedock.data.conversation import Conversation, Document, Example, Labelled, Message, Preference, ToolCall

ODD = (
    "a",
    "b\n",
    " c",
    "\r",
    "\r\n",
    '"',
    ",",
    "\t",
    "\u2028",
    "\x00",
    "\ufeff",
    "<think>",
    "</think>",
    "{}",
    "[1]",
    "null",
    "true",
    "😀",
)
TEXTS = st.lists(st.sampled_from(ODD) | st.text(st.characters(exclude_categories=["Cs"]), max_size=3), max_size=4).map(
    "".join
)
SAID = TEXTS.filter(lambda text: text.strip() and not text.lstrip().startswith("<think>"))
PLAIN = st.text("abc 天\n", min_size=1, max_size=8).filter(lambda text: text.strip() == text)
NAMES = st.sampled_from(["add", "look_up"])
ARGUMENTS: st.SearchStrategy[Any] = st.dictionaries(
    st.sampled_from(["b", "a", "天"]),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXTS, inner, max_size=2),
        max_leaves=4,
    ),
    max_size=2,
)
CALLS = st.builds(ToolCall, NAMES, ARGUMENTS, st.none() | st.sampled_from(["call_1", "call_2"]))
FUNCTIONS = st.builds(lambda name, parameters: {"name": name, "parameters": parameters}, NAMES, ARGUMENTS)
TOOLS = st.lists(FUNCTIONS.map(lambda function: {"type": "function", "function": function}), max_size=2).map(tuple)
MARKS = st.sampled_from([None, None, None, 0.0, 1.0])


def seldom(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.sampled_from([None, None, None]) | values


@st.composite
def answers(draw: st.DrawFn, *, simple: bool = False) -> Message:
    said = draw(PLAIN if simple else SAID)
    if simple:
        return Message("assistant", said)
    reasoning = draw(seldom(PLAIN))
    calls = tuple(draw(seldom(st.lists(CALLS, min_size=1, max_size=2))) or ())
    content = "" if calls and draw(st.booleans()) else said
    return Message(
        "assistant",
        content.lstrip() or ("" if calls else "x") if reasoning else content,
        weight=draw(MARKS),
        reasoning=reasoning,
        tool_calls=calls,
        name=draw(seldom(st.just("Ada"))),
    )


@st.composite
def turns(draw: st.DrawFn, *, simple: bool = False) -> tuple[Message, ...]:
    """Turns that end with an answer."""
    made: list[Message] = []
    if draw(st.booleans()):
        made.append(Message("system", draw(PLAIN if simple else SAID)))
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        made.append(
            Message("user", draw(PLAIN if simple else SAID), name=None if simple else draw(seldom(st.just("Bob"))))
        )
        made.append(draw(answers(simple=simple)))
        if made[-1].tool_calls:
            made.append(Message("tool", draw(TEXTS), tool_call_id=draw(seldom(st.just("call_1")))))
            made.append(draw(answers(simple=simple)))
    return tuple(made)


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    messages = draw(turns(simple=draw(st.booleans())))
    if draw(st.booleans()):  # only the last one trained, as Alpaca has it
        *before, last = messages
        earlier = [replace(m, weight=0.0) if m.role == "assistant" else m for m in before]
        messages = (*earlier, last if last.weight != 0.0 else replace(last, weight=None))
    return Conversation(messages, draw(TOOLS))


@st.composite
def completions(draw: st.DrawFn) -> tuple[tuple[Message, ...], tuple[Message, ...], tuple[Message, ...]]:
    """(a prompt, two continuations)."""
    simple = draw(st.booleans())
    *prompt, chosen = draw(turns(simple=simple))
    context = tuple(replace(m, weight=0.0) if m.role == "assistant" else m for m in prompt)
    return context, (chosen,), (draw(answers(simple=simple)),)


PREFERENCES = st.builds(lambda parts, tools: Preference(*parts, tools), completions(), TOOLS)
LABELLED = st.builds(
    lambda parts, label, tools: Labelled(parts[0], parts[1], label, tools), completions(), st.booleans(), TOOLS
)
DOCUMENTS = st.builds(Document, TEXTS.filter(str.strip))
EXAMPLES: dict[type[Example], st.SearchStrategy[Any]] = {
    Conversation: conversations(),
    Preference: PREFERENCES,
    Labelled: LABELLED,
    Document: DOCUMENTS,
}


def as_lines(rows: list[Any]) -> str:
    """JSON lines; text stands as it is."""
    return "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)
