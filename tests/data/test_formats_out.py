"""Writing is the inverse of reading: what a format says is read back as it was, through any other format, to the same tokens."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from families import stop_ids, tokenizer
from talks import EXAMPLES, PLAIN, conversations, turns
from tunedock.data import formats_out
from tunedock.data.chat import Chat
from tunedock.data.conversation import (
    Conversation,
    Document,
    Example,
    Labelled,
    Message,
    Preference,
    RowRefused,
    ToolCall,
    verdicts,
)
from tunedock.data.formats import detect, parse
from tunedock.data.formats_out import FORMATS, held, marked, say, schema, spellings
from tunedock.recipe.schema import Source

ASK, REPLY = Message("user", "q"), Message("assistant", "a")
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = Message("assistant", "", tool_calls=(ToolCall("add", {"x": 1}),))
PAIRS = [(a, b) for a in FORMATS for b in FORMATS if a != b and held(a) is held(b)]


def said(example: Example, format: str, spelling: str = "trl") -> dict[str, Any] | None:
    try:
        return say(example, format, spelling)
    except RowRefused:
        return None


def refusal(example: Example, format: str, spelling: str = "trl") -> str:
    with pytest.raises(RowRefused) as caught:
        say(example, format, spelling)
    return caught.value.reason


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_row_is_read_back_as_it_was(format: str, data: st.DataObject) -> None:
    example = data.draw(EXAMPLES[held(format)])
    spelling = data.draw(st.sampled_from(spellings(format) or ("trl",)))
    row = said(example, format, spelling)
    if row is not None:
        assert marked(parse(row, format, {})) == marked(example)
        columns = schema(format, spelling)
        assert columns is None or set(row) <= set(columns.names)
        assert detect([row]) == format, "a file of such rows needs no `format:`"


@pytest.mark.parametrize(("first", "second"), PAIRS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_there_and_back(first: str, second: str, data: st.DataObject) -> None:
    example = data.draw(EXAMPLES[held(first)])
    here = said(example, first)
    there = here and said(parse(here, first, {}), second)
    if there:
        back = say(parse(there, second, {}), first)
        assert back == here
        assert marked(parse(back, first, {})) == marked(example)


@settings(max_examples=25, deadline=None)
@given(example=conversations())
def test_messages_say_every_conversation(example: Conversation) -> None:
    assert parse(say(example, "messages"), "messages", {}) == marked(example)


@settings(max_examples=25, deadline=None)
@given(messages=turns(simple=True), reasoning=st.none() | PLAIN)
def test_plain_talk_is_said_by_every_format_that_has_room(messages: tuple[Message, ...], reasoning: str | None) -> None:
    *before, last = messages
    context = [replace(m, weight=0.0) if m.role == "assistant" else m for m in before]
    example = Conversation((*context, replace(last, reasoning=reasoning)), (TOOL,))
    several = sum(m.role == "user" for m in messages) > 1
    rooms = {name for name in FORMATS if held(name) is Conversation and said(example, name)}
    assert rooms == {"messages", "alpaca"} | (set() if several else {"sharegpt", "prompt_completion"})
    assert said(Conversation(messages), "sharegpt"), "every answer is trained"


@pytest.mark.parametrize("family", ["qwen3", "qwen3-2507", "llama3.2", "mistral"])
@settings(max_examples=12, deadline=None)
@given(example=conversations())
def test_the_tokens_and_their_weights_are_the_same(family: str, example: Conversation) -> None:
    chat = Chat(tokenizer(family), stop_ids=stop_ids(family), max_length=4096, over_length="drop", train_on="assistant")
    through = [parse(row, name, {}) for name in FORMATS if held(name) is Conversation and (row := said(example, name))]
    before, *after = chat.encode([("row", one) for one in (example, *through)])
    for outcome in after:
        if isinstance(before, RowRefused):
            assert isinstance(outcome, RowRefused)
            assert outcome.reason == before.reason
            continue
        assert not isinstance(outcome, RowRefused)
        for mine, theirs in zip(before, outcome, strict=True):
            for leaf in mine.sample.leaves():
                for ours, others in zip(mine.sample.path(leaf), theirs.sample.path(leaf), strict=True):
                    assert np.array_equal(ours, others)


def test_rows_look_as_their_tools_expect() -> None:
    talk = Conversation(
        (Message("system", "s"), ASK, CALL, Message("tool", "2"), Message("assistant", "a", reasoning="r")), (TOOL,)
    )
    function = {"name": "add", "arguments": '{"x": 1}'}
    assert say(talk, "messages") == {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "a", "reasoning_content": "r"},
        ],
        "tools": [TOOL],
    }
    assert say(talk, "sharegpt") == {
        "conversations": [
            {"from": "system", "value": "s"},
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "<think>\nr\n</think>\n\na"},
        ],
        "tools": '[{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]',
    }
    context = Message("assistant", "a1", weight=0.0)
    history = Conversation((Message("system", "s"), Message("user", "q1"), context, ASK, REPLY))
    assert say(history, "alpaca") == {
        "instruction": "q", "input": "", "output": "a", "system": "s", "history": [["q1", "a1"]],
    }  # fmt: skip
    assert say(Conversation((ASK, REPLY)), "prompt_completion") == {"prompt": "q", "completion": "a"}
    assert say(Document("t"), "text") == {"text": "t"}
    turn = {"role": "user", "content": "q"}
    pair = Preference((ASK,), (REPLY,), (Message("assistant", "b"),))
    better, worse = {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}
    assert say(pair, "preference") == {"prompt": [turn], "chosen": [better], "rejected": [worse]}
    assert say(pair, "preference", "flat") == {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert say(replace(pair, tools=(TOOL,)), "preference", "openai") == {
        "input": {"messages": [turn], "tools": [TOOL]}, "preferred_output": [better], "non_preferred_output": [worse],
    }  # fmt: skip
    shared = {"from": "human", "value": "q"}
    assert say(pair, "preference", "llamafactory") == {
        "conversations": [shared], "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"},
    }  # fmt: skip
    kto = {"conversations": [shared, {"from": "gpt", "value": "b"}], "kto_tag": False}
    assert say(verdicts(pair)[1], "labelled", "llamafactory") == kto
    wanted, unwanted = verdicts(pair)
    assert say(wanted, "labelled") == {"prompt": [turn], "completion": [better], "label": True}
    assert say(unwanted, "labelled", "flat") == {"prompt": "q", "completion": "b", "label": False}


def test_marks_that_change_nothing_are_left_out() -> None:
    trained = Message("assistant", "a", weight=1.0)
    assert marked(Conversation((ASK, trained, ASK, trained))).messages[1::2] == (trained, REPLY)
    pair = Preference((ASK, trained, ASK), (trained,), (Message("assistant", "b", weight=0.0),))
    plain = Preference((ASK, Message("assistant", "a", weight=0.0), ASK), (REPLY,), pair.rejected)
    assert marked(pair) == plain
    assert say(Labelled(pair.prompt, (trained,), True), "labelled")["prompt"][1] == {
        "role": "assistant",
        "content": "a",
    }


UNTRAINED = Message("assistant", "a", weight=0.0)
REFUSED: list[tuple[str, Example, str]] = [
    ("alpaca", Conversation((ASK, CALL)), "tool_turns"),
    ("alpaca", Conversation((ASK, REPLY, ASK, REPLY)), "trained_history"),
    ("alpaca", Conversation((ASK, UNTRAINED)), "untrained_answer"),
    ("alpaca", Conversation((REPLY,)), "several_turns"),
    ("alpaca", Conversation((Message("user", "q", name="Bob"), REPLY)), "turn_name"),
    ("alpaca", Conversation((Message("user", "q", name="Bob"), REPLY)), "turn_name"),
    ("prompt_completion", Conversation((ASK, UNTRAINED, ASK, REPLY)), "several_turns"),
    ("prompt_completion", Conversation((ASK, UNTRAINED)), "untrained_answer"),
    ("sharegpt", Conversation((ASK, UNTRAINED, ASK, REPLY)), "untrained_answer"),
    ("sharegpt", Conversation((Message("user", "q", name="Bob"), REPLY)), "turn_name"),
    ("sharegpt", Conversation((ASK, Message("assistant", "a", tool_calls=CALL.tool_calls))), "call_beside_text"),
    ("sharegpt", Conversation((ASK, Message("assistant", "", tool_calls=(ToolCall("add", {}, "1"),)))), "call_id"),
    ("sharegpt", Conversation((ASK, CALL, Message("tool", "2", tool_call_id="1"), REPLY)), "call_id"),
    ("sharegpt", Conversation((ASK, Message("assistant", "\na", reasoning="r"))), "reads_otherwise"),
    ("messages", Conversation((ASK, Message("assistant", "<think>x</think>a"))), "reads_otherwise"),
    ("text", Document(" "), "reads_otherwise"),
]


@pytest.mark.parametrize(("format", "example", "reason"), REFUSED)
def test_what_a_format_cannot_say_is_refused(format: str, example: Example, reason: str) -> None:
    assert refusal(example, format) == reason


def test_a_flat_table_holds_one_question_and_its_answer() -> None:
    pair = Preference((ASK, UNTRAINED, ASK), (REPLY,), (REPLY,))
    assert refusal(pair, "preference", "flat") == "several_turns"
    longer = Preference((ASK,), (REPLY, ASK, REPLY), (REPLY,))
    assert refusal(longer, "preference", "llamafactory") == "several_turns"
    assert said(longer, "preference", "openai")
    assert refusal(Labelled((ASK,), (REPLY, ASK, REPLY), True), "labelled", "flat") == "several_turns"
    assert say(pair, "preference")


def test_every_reason_is_in_the_table_and_tried() -> None:
    table = Counter(re.findall(r"^\| (\w+_\w+) \|", str(formats_out.__doc__), re.MULTILINE))
    assert set(table) - {"prompt_completion"} == {reason for _, _, reason in REFUSED}


def test_every_format_that_is_read_is_written() -> None:
    known = Source.model_json_schema()["properties"]["format"]["enum"]
    assert sorted(FORMATS) == sorted(name for name in known if name not in ("auto", "prompt")), (
        "a prompt is no row to train on"
    )
