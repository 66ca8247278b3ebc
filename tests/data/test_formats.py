"""Every format, its spellings and its traps; what a row is refused for; how a format is told."""

from __future__ import annotations

import datetime
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunedock.data.conversation import (
    Conversation,
    Document,
    Labelled,
    Message,
    Preference,
    Prompt,
    RowRefused,
    from_json,
    to_json,
)
from tunedock.data.formats import asked, detect, group_of, margin_of, parse
from tunedock.errors import DataError
from tunedock.recipe.schema import Source

USER, ANSWER = Message("user", "q"), Message("assistant", "a")
ASK, REPLY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
FORMATS = ("alpaca", "sharegpt", "messages", "prompt_completion", "text", "preference", "labelled")


def conversation(value: dict[str, Any], format: str, **columns: str) -> Conversation:
    found = parse(value, format, columns)
    assert isinstance(found, Conversation)
    return found


def refused(value: Any, format: str, columns: dict[str, str] | None = None) -> tuple[str, str]:
    with pytest.raises(RowRefused) as caught:
        parse(value, format, columns or {})
    return caught.value.reason, caught.value.detail


# Alpaca


def test_alpaca_joins_input_and_leaves_history_untrained() -> None:
    row = {"instruction": "i", "input": "n", "output": "o", "system": "s", "history": [["q1", "a1"], ["q2", "a2"]]}
    assert conversation(row, "alpaca").messages == (
        Message("system", "s"),
        Message("user", "q1"),
        Message("assistant", "a1", weight=0.0),
        Message("user", "q2"),
        Message("assistant", "a2", weight=0.0),
        Message("user", "i\nn"),
        Message("assistant", "o"),
    )


@pytest.mark.parametrize("empty", [{}, {"input": ""}, {"input": None, "history": None, "system": ""}, {"history": []}])
def test_alpaca_columns_left_out(empty: dict[str, Any]) -> None:
    assert conversation({"instruction": "q", "output": "a", **empty}, "alpaca").messages == (USER, ANSWER)


@pytest.mark.parametrize(
    ("change", "reason", "word"),
    [
        ({"output": ""}, "empty_answer", "output"),
        ({"output": " \n"}, "empty_answer", "output"),
        ({"output": {"answer": 1}}, "wrong_type", "`output` must be a string, not an object"),
        ({"output": None}, "missing_column", "`output` is missing or null; the row has instruction"),
        ({"instruction": "", "input": ""}, "empty_prompt", "instruction"),
        ({"instruction": 5}, "wrong_type", "`instruction` must be a string, not a number"),
        ({"history": [["q"]]}, "wrong_type", "history[0]"),
        ({"history": [["q", ""]]}, "empty_answer", "history[0]"),
        ({"history": "no list"}, "wrong_type", "history"),
        ({"system": ["s"]}, "wrong_type", "system"),
        ({"output": "<think>only thoughts</think>\n"}, "empty_answer", "after its thinking"),
        ({"output": "<think>cut off"}, "empty_answer", "never ends"),
        ({"output": "half \ud83d pair"}, "bad_content", "surrogate"),
    ],
)
def test_alpaca_refusals(change: dict[str, Any], reason: str, word: str) -> None:
    found, detail = refused({"instruction": "i", "output": "o", **change}, "alpaca")
    assert (found, word in detail) == (reason, True), detail


# Thinking


@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        ("<think>\nwhy\n</think>\n\nbecause", "why", "because"),
        ("  <think>why</think>because", "why", "because"),
        ("\n<think> why </think> because ", "why", "because "),
        ("<think>\n\n</think>\n\nbecause", None, "because"),
        ("<think></think>because", None, "because"),
        ("<think>a <think> b</think>c</think>", "a <think> b", "c</think>"),
        ("because <think>late</think>", None, "because <think>late</think>"),
        ("because", None, "because"),
    ],
)
def test_thinking(text: str, reasoning: str | None, content: str) -> None:
    answer = conversation({"prompt": "q", "completion": text}, "prompt_completion").messages[-1]
    assert (answer.reasoning, answer.content) == (reasoning, content)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_fields_of_turns(key: str) -> None:
    turns = [ASK, {**REPLY, key: "\nwhy\n"}]
    assert conversation({"messages": turns}, "messages").messages[-1] == Message("assistant", "a", reasoning="why")
    assert conversation({"messages": [ASK, {**REPLY, key: ""}]}, "messages").messages[-1] == ANSWER
    same = [ASK, {"role": "assistant", "content": "<think>why</think>a", key: "why"}]
    assert conversation({"messages": same}, "messages").messages[-1].reasoning == "why"
    differ = [ASK, {"role": "assistant", "content": "<think>why</think>a", key: "other"}]
    assert refused({"messages": differ}, "messages")[0] == "bad_content"
    assert (
        refused({"messages": [ASK, {"role": "assistant", "content": "", key: "why"}]}, "messages")[0] == "empty_answer"
    )


def test_a_column_of_reasoning() -> None:
    row = {"instruction": "q", "output": "a", "cot": "why", "reasoning": "on"}
    assert conversation(row, "alpaca").messages[-1].reasoning is None
    assert conversation(row, "alpaca", reasoning="cot").messages[-1].reasoning == "why"
    row = {"prompt": "q", "completion": "a", "reasoning_content": "why"}
    assert conversation(row, "prompt_completion").messages[-1].reasoning == "why"


# ShareGPT

TOOL = {"name": "weather", "description": "d", "parameters": {"type": "object"}}
WRAPPED = {"type": "function", "function": TOOL}


@pytest.mark.parametrize("human", ["human", "user"])
@pytest.mark.parametrize("gpt", ["gpt", "assistant", "chatgpt", "bing"])
def test_sharegpt_roles(human: str, gpt: str) -> None:
    row = {"conversations": [{"from": human, "value": "q"}, {"from": gpt, "value": "a"}], "system": "s"}
    assert conversation(row, "sharegpt").messages == (Message("system", "s"), USER, ANSWER)


def test_sharegpt_with_the_keys_of_messages() -> None:
    assert conversation({"conversations": [ASK, REPLY]}, "sharegpt").messages == (USER, ANSWER)


@pytest.mark.parametrize("arguments", [{"city": "Rome"}, '{"city": "Rome"}'])
@pytest.mark.parametrize("observation", ["observation", "tool"])
@pytest.mark.parametrize("tools", [json.dumps([TOOL]), [TOOL], [WRAPPED], json.dumps(WRAPPED), [json.dumps(TOOL)]])
def test_sharegpt_tools(arguments: Any, observation: str, tools: Any) -> None:
    call = "<think>look</think>" + json.dumps({"name": "weather", "arguments": arguments})
    turns = [("human", "q"), ("function_call", call), (observation, "sunny"), ("gpt", "a")]
    row = {"conversations": [{"from": role, "value": text} for role, text in turns], "tools": tools}
    found = conversation(row, "sharegpt")
    assert found.tools == (WRAPPED,)
    asked = found.messages[1]
    assert (asked.role, asked.content, asked.reasoning) == ("assistant", "", "look")
    assert [(c.name, c.arguments) for c in asked.tool_calls] == [("weather", {"city": "Rome"})]
    assert found.messages[2:] == (Message("tool", "sunny"), ANSWER)


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([("robot", "q"), ("gpt", "a")], "wrong_roles"),
        ([("human", "q"), ("gpt", "a"), ("human", "more")], "wrong_roles"),
        ([("human", "q"), ("gpt", "a"), ("observation", "r")], "wrong_roles"),
        ([("human", "q"), ("system", "s"), ("gpt", "a")], "wrong_roles"),
        ([("human", "q"), ("observation", "r"), ("gpt", "a")], "wrong_roles"),
        ([("observation", "r"), ("gpt", "a")], "wrong_roles"),
        ([("human", "q")], "no_assistant_turn"),
        ([], "no_assistant_turn"),
        ([("human", "q"), ("gpt", "")], "empty_answer"),
        ([("human", ""), ("gpt", "a")], "empty_prompt"),
        ([("human", "q"), ("function_call", "weather()"), ("gpt", "a")], "bad_tools"),
        ([("human", "q"), ("function_call", '{"arguments": {}}'), ("gpt", "a")], "bad_tools"),
        ([("human", "q"), ("function_call", '{"name": "f", "arguments": [1]}'), ("gpt", "a")], "bad_tools"),
        ([("human", "q"), ("gpt", 5)], "wrong_type"),
        ([(None, "q"), ("gpt", "a")], "wrong_roles"),
    ],
)
def test_sharegpt_refusals(turns: list[tuple[Any, Any]], reason: str) -> None:
    assert refused({"conversations": [{"from": r, "value": t} for r, t in turns]}, "sharegpt")[0] == reason


@pytest.mark.parametrize(
    "roles", [["gpt"], ["gpt", "human", "gpt"], ["human", "human", "gpt"], ["human", "gpt", "gpt"], ["system", "gpt"]]
)
def test_the_order_of_turns_is_the_templates_matter(roles: list[str]) -> None:
    row = {"conversations": [{"from": role, "value": "x"} for role in roles]}
    assert len(conversation(row, "sharegpt").messages) == len(roles)


@pytest.mark.parametrize(
    "tools", ["{", [5], 5, [{"description": "no name"}], [{"type": "function", "function": {}}], '"f"']
)
def test_bad_tools(tools: Any) -> None:
    assert refused({"messages": [ASK, REPLY], "tools": tools}, "messages")[0] == "bad_tools"


@pytest.mark.parametrize("tools", [None, "", "[]", []])
def test_no_tools(tools: Any) -> None:
    assert conversation({"messages": [ASK, REPLY], "tools": tools}, "messages").tools == ()


def test_tools_too_deep_or_not_json() -> None:
    deep: dict[str, Any] = {}
    for _ in range(500):
        deep = {"a": deep}
    for parameters in (deep, {"x": float("nan")}, {"x": b"bytes"}, {"x": "\ud83d"}):
        tools = [{"name": "f", "parameters": parameters}]
        assert refused({"messages": [ASK, REPLY], "tools": tools}, "messages")[0] == "bad_tools"


# OpenAI messages


def test_messages_with_tools_weights_parts_and_names() -> None:
    calls = [
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}},
        {"id": "c2", "type": "function", "function": {"name": "g", "arguments": ""}},
    ]
    row = {
        "messages": [
            {"role": "developer", "content": "s"},
            {
                "role": "user",
                "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}],
                "name": "Ann",
            },
            {"role": "assistant", "content": None, "tool_calls": calls, "weight": 0},
            {"role": "tool", "tool_call_id": "c1", "content": "r1"},
            {"role": "tool", "tool_call_id": "c2", "content": ""},
            {"role": "assistant", "content": "a", "weight": 1},
        ],
        "tools": [WRAPPED],
    }
    found = conversation(row, "messages")
    system, user, call, first, second, answer = found.messages
    assert system == Message("system", "s")
    assert user == Message("user", "one two", name="Ann")
    assert (call.content, call.weight) == ("", 0.0)
    assert [(c.name, c.arguments, c.id) for c in call.tool_calls] == [("f", {"x": 1}, "c1"), ("g", {}, "c2")]
    assert (first.tool_call_id, first.content, second.tool_call_id, second.content) == ("c1", "r1", "c2", "")
    assert answer == Message("assistant", "a", weight=1.0)
    assert found.tools == (WRAPPED,)
    assert from_json(json.loads(json.dumps(to_json(found)))) == found


def test_the_older_function_call() -> None:
    turns = [ASK, {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}]
    assert conversation({"messages": turns}, "messages").messages[-1].tool_calls[0].name == "f"


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"role": "assistant", "content": None}, "empty_answer"),
        ({"role": "assistant", "content": [{"type": "image_url", "image_url": {}}]}, "bad_content"),
        ({"role": "assistant", "content": [{"type": "text"}]}, "bad_content"),
        ({"role": "assistant", "content": [3]}, "bad_content"),
        ({"role": "assistant", "content": {"text": "a"}}, "wrong_type"),
        ({"role": "assistant", "content": "a", "weight": 0.5}, "wrong_type"),
        ({"role": "assistant", "content": "a", "weight": "1"}, "wrong_type"),
        ({"role": "assistant", "content": "", "tool_calls": "{"}, "bad_tools"),
        (
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "x"}}]},
            "bad_tools",
        ),
        ({"content": "a"}, "wrong_roles"),
        ("a", "wrong_type"),
    ],
)
def test_messages_refusals(turn: Any, reason: str) -> None:
    assert refused({"messages": [ASK, turn]}, "messages")[0] == reason


def test_lists_as_text() -> None:
    assert conversation({"messages": json.dumps([ASK, REPLY])}, "messages").messages == (USER, ANSWER)
    assert refused({"messages": "hello"}, "messages")[0] == "wrong_type"


# Prompt and completion


@pytest.mark.parametrize(
    "names",
    [
        ("prompt", "completion"),
        ("prompt", "response"),
        ("prompt", "answer"),
        ("input", "output"),
        ("question", "answer"),
    ],
)
def test_prompt_and_completion(names: tuple[str, str]) -> None:
    row = dict(zip(names, "qa", strict=True))
    assert conversation(row, "prompt_completion").messages == (USER, ANSWER)
    assert detect([row]) == "prompt_completion"


def test_prompt_of_turns_is_context() -> None:
    row = {"prompt": [ASK, REPLY, {"role": "user", "content": "q2"}], "completion": [REPLY]}
    assert conversation(row, "prompt_completion").messages == (
        USER,
        Message("assistant", "a", weight=0.0),
        Message("user", "q2"),
        ANSWER,
    )


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "q"}, "missing_column"),
        ({"completion": "a"}, "missing_column"),
        ({"prompt": " ", "completion": "a"}, "empty_prompt"),
        ({"prompt": [], "completion": "a"}, "empty_prompt"),
        ({"prompt": "q", "completion": ""}, "empty_answer"),
        ({"prompt": "q", "completion": []}, "no_assistant_turn"),
        ({"prompt": 3, "completion": "a"}, "wrong_type"),
        ([], "wrong_type"),
    ],
)
def test_prompt_completion_refusals(row: Any, reason: str) -> None:
    assert refused(row, "prompt_completion")[0] == reason


# Text


def test_text() -> None:
    assert parse({"text": "t"}, "text", {}) == Document("t")
    assert parse({"body": "t"}, "text", {"prompt": "body"}) == Document("t")
    assert parse({"body": "t", "text": "no"}, "text", {"text": "body"}) == Document("t")
    assert refused({"text": " \n"}, "text")[0] == "empty_text"
    assert refused({"text": 3}, "text")[0] == "wrong_type"
    assert refused({"body": "t"}, "text")[0] == "missing_column"


# Preference

PAIR = Preference((USER,), (ANSWER,), (Message("assistant", "b"),))
WORSE = {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"},
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        {"messages": [ASK], "chosen": [REPLY], "rejected": [WORSE]},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": [ASK], "chosen": [REPLY], "rejected": [WORSE]},
        {"chosen": [ASK, REPLY], "rejected": [ASK, WORSE]},
        {"prompt": "q", "chosen": [ASK, REPLY], "rejected": [ASK, WORSE], "score": 1.0},
        {"input": {"messages": [ASK], "tools": []}, "preferred_output": [REPLY], "non_preferred_output": [WORSE]},
    ],
)
def test_preference_spellings(row: dict[str, Any]) -> None:
    assert detect([row]) == "preference"
    assert parse(row, "preference", {}) == PAIR


def test_preference_of_whole_conversations_shares_all_turns_before_the_difference() -> None:
    more = {"role": "user", "content": "q2"}
    found = parse({"chosen": [ASK, REPLY, more, REPLY], "rejected": [ASK, REPLY, more, WORSE]}, "preference", {})
    context = Message("assistant", "a", weight=0.0)
    assert found == Preference((USER, context, Message("user", "q2")), (ANSWER,), (Message("assistant", "b"),))
    same = parse({"chosen": [ASK, REPLY], "rejected": [ASK, REPLY]}, "preference", {})
    assert same == Preference((USER,), (ANSWER,), (ANSWER,))


def test_openai_preference_keeps_its_tools() -> None:
    row = {"input": {"messages": [ASK], "tools": [TOOL]}, "preferred_output": [REPLY], "non_preferred_output": [WORSE]}
    found = parse(row, "preference", {})
    assert isinstance(found, Preference)
    assert found.tools == (WRAPPED,)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "q", "chosen": "a"}, "missing_column"),
        ({"chosen": "a", "rejected": "b"}, "missing_column"),
        ({"prompt": "q", "chosen": "a", "rejected": ""}, "empty_answer"),
        ({"prompt": "q", "chosen": [ASK, REPLY], "rejected": [{"role": "user", "content": "x"}, WORSE]}, "wrong_roles"),
        ({"prompt": "z", "chosen": [ASK, REPLY], "rejected": [ASK, WORSE]}, "wrong_roles"),
        ({"chosen": [ASK, ASK, REPLY], "rejected": [ASK, WORSE]}, "wrong_roles"),
        ({"prompt": "q", "chosen": [], "rejected": []}, "no_assistant_turn"),
        ({"prompt": "q", "chosen": 4, "rejected": "b"}, "wrong_type"),
    ],
)
def test_preference_refusals(row: dict[str, Any], reason: str) -> None:
    assert refused(row, "preference")[0] == reason


# Labelled


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "completion": "a"},
        {"prompt": [ASK], "completion": [REPLY]},
        {"instruction": "q", "output": "a"},
        {"messages": [ASK, REPLY]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    ],
)
@pytest.mark.parametrize("name", ["kto_tag", "label"])
@pytest.mark.parametrize("label", [True, False, "True", "false"])
def test_labelled_spellings(row: dict[str, Any], name: str, label: bool | str) -> None:
    wanted = label if isinstance(label, bool) else label == "True"
    assert detect([{**row, name: label}]) == "labelled"
    assert parse({**row, name: label}, "labelled", {}) == Labelled((USER,), (ANSWER,), wanted)


@pytest.mark.parametrize("label", [1, 0.0, "good", "", [], {}])
def test_bad_labels(label: Any) -> None:
    assert refused({"prompt": "q", "completion": "a", "kto_tag": label}, "labelled")[0] == "bad_label"
    assert detect([{"prompt": "q", "completion": "a", "kto_tag": label}]) == "labelled"


def test_a_class_is_no_verdict_unless_the_recipe_says_so() -> None:
    row = {"prompt": "q", "completion": "a", "label": "sports"}
    assert detect([row]) == "prompt_completion"
    assert detect([row], Source(path="a", columns={"label": "label"})) == "labelled"
    assert refused({"prompt": "q", "completion": "a"}, "labelled")[0] == "missing_column"


# Columns, system prompts, groups


@pytest.mark.parametrize(
    ("row", "format", "columns"),
    [
        ({"frage": "q", "antwort": "a"}, "prompt_completion", {"prompt": "frage", "completion": "antwort"}),
        (
            {"frage": "q", "antwort": "a", "prompt": "no"},
            "prompt_completion",
            {"prompt": "frage", "response": "antwort"},
        ),
        ({"p": "q", "r": "a"}, "alpaca", {"instruction": "p", "output": "r"}),
        ({"chat": [ASK, REPLY]}, "messages", {"messages": "chat"}),
        (
            {"chat": [{"who": "human", "said": "q"}, {"who": "gpt", "said": "a"}]},
            "sharegpt",
            {"conversations": "chat", "role": "who", "content": "said"},
        ),
    ],
)
def test_columns(row: dict[str, Any], format: str, columns: dict[str, str]) -> None:
    assert conversation(row, format, **columns).messages == (USER, ANSWER)
    assert detect([row], Source(path="a", columns=columns)) == format


def test_columns_of_pairs_and_labels() -> None:
    pair = parse(
        {"p": "q", "good": "a", "bad": "b"}, "preference", {"prompt": "p", "chosen": "good", "rejected": "bad"}
    )
    assert pair == PAIR
    labelled = parse({"p": "q", "r": "a", "ok": True}, "labelled", {"prompt": "p", "completion": "r", "label": "ok"})
    assert labelled == Labelled((USER,), (ANSWER,), True)


def test_a_mapped_column_that_is_missing_is_named() -> None:
    reason, detail = refused({"prompt": "q", "completion": "a"}, "prompt_completion", {"prompt": "question"})
    assert (reason, "`question`" in detail) == ("missing_column", True)


@pytest.mark.parametrize("format", ["messages", "alpaca", "prompt_completion"])
def test_default_system_prompt(format: str) -> None:
    row = {"messages": [ASK, REPLY], "instruction": "q", "prompt": "q", "output": "a", "completion": "a"}
    found = parse(row, format, {}, system="default")
    assert isinstance(found, Conversation)
    assert found.messages[0] == Message("system", "default")
    found = parse({**row, "system": "own"}, format, {}, system="default")
    assert isinstance(found, Conversation)
    assert found.messages[0] == Message("system", "own")


def test_system_turns_and_columns() -> None:
    own = {"messages": [{"role": "system", "content": "own"}, ASK, REPLY]}
    found = parse(own, "messages", {}, system="default")
    assert isinstance(found, Conversation)
    assert [m.content for m in found.messages] == ["own", "q", "a"]
    assert refused({**own, "system": "other"}, "messages")[0] == "wrong_roles"
    for row in ({"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "q", "completion": "a", "label": True}):
        judged = parse(row, detect([row]), {}, system="default")
        assert isinstance(judged, Preference | Labelled)
        assert judged.prompt == (Message("system", "default"), USER)


@pytest.mark.parametrize(("value", "group"), [("x", "x"), (3, "3"), (True, "true"), ("", "")])
def test_groups(value: Any, group: str) -> None:
    assert group_of({"doc": value}, "doc") == group


@pytest.mark.parametrize(
    ("row", "reason"), [({}, "missing_column"), ({"doc": None}, "missing_column"), ({"doc": [1]}, "wrong_type")]
)
def test_rows_without_a_group(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowRefused) as caught:
        group_of(row, "doc")
    assert caught.value.reason == reason


# Detection


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"instruction": "i", "input": "", "output": "o", "text": "all of it"}, "alpaca"),
        ({"prompt": "p", "prompt_id": "1", "messages": [ASK, REPLY]}, "messages"),
        ({"conversations": [], "id": 1}, "sharegpt"),
        ({"text": "t", "meta": {}}, "text"),
        ({"messages": None, "prompt": "q", "completion": "a"}, "prompt_completion"),
    ],
)
def test_detect(row: dict[str, Any], format: str) -> None:
    assert detect([row]) == format


def test_detect_goes_by_the_majority() -> None:
    alpaca, text = {"instruction": "i", "output": "o"}, {"text": "t"}
    assert detect([alpaca, alpaca, text]) == "alpaca"
    with pytest.raises(DataError) as caught:
        detect([alpaca, text], Source(path="a.jsonl"))
    assert caught.value.where == "a.jsonl"
    assert "alpaca 1" in caught.value.message


def test_detect_names_what_it_saw_and_the_way_out() -> None:
    with pytest.raises(DataError) as caught:
        detect([{"frage": "q", "antwort": "a"}])
    assert "frage, antwort" in caught.value.message
    assert "columns:" in str(caught.value.hint)
    assert all(format in str(caught.value.hint) for format in FORMATS)
    with pytest.raises(DataError, match="no row could be read") as caught:
        detect([])
    assert "format:" not in str(caught.value.hint), "no format makes rows of nothing"
    with pytest.raises(DataError, match="is no format"):
        parse({}, "alpacca", {})


# Anything at all

KEYS = (
    *(
        "messages",
        "conversations",
        "prompt",
        "completion",
        "instruction",
        "input",
        "output",
        "history",
        "system",
        "tools",
    ),
    *("chosen", "rejected", "label", "kto_tag", "text", "role", "content", "from", "value", "tool_calls", "function"),
    *("name", "arguments", "weight", "reasoning", "type", "id", "preferred_output", "non_preferred_output"),
)
WORDS = (
    "user",
    "assistant",
    "system",
    "tool",
    "gpt",
    "human",
    "function_call",
    "text",
    "{}",
    "[]",
    "[[",
    "<think>",
    "<think>x</think>",
)
TEXTS = st.sampled_from(WORDS) | st.text(st.characters(), max_size=8)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
CALLS = st.sampled_from(
    [[{"function": {"name": "f", "arguments": "{}"}}], [{"name": "f", "arguments": {"x": [1]}}], [], "[{"]
)
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(WORDS[:7]), "content": TEXTS | st.none()},
    optional={"tool_calls": CALLS, "reasoning": TEXTS, "weight": st.sampled_from([0, 1, 0.5, None]), "name": TEXTS},
)
VALUES = st.recursive(
    LEAVES | TURN | st.lists(TURN, max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)
NOISE = st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=8)
SOUND: list[dict[str, Any]] = [
    {"instruction": "q", "output": "a"},
    {"messages": [ASK, REPLY], "tools": [WRAPPED]},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    {"prompt": "q", "completion": "a", "label": True},
    {"prompt": "q", "chosen": "a", "rejected": "b"},
    {"chosen": [ASK, REPLY], "rejected": [ASK, WORSE]},
    {"text": "t"},
]
NEARLY_SOUND = st.builds(
    lambda row, noise: {**row, **noise},
    st.sampled_from(SOUND),
    st.dictionaries(st.sampled_from(KEYS), VALUES | TEXTS | st.lists(TURN, max_size=3), max_size=1),
)
TALKS = st.builds(
    lambda turns, noise: {"messages": [*turns, REPLY], **noise},
    st.lists(TURN, max_size=3),
    st.dictionaries(st.sampled_from(("system", "tools", "label")), VALUES | TEXTS, max_size=1),
)
ANY_ROWS = NOISE | NEARLY_SOUND | TALKS


@settings(max_examples=400, deadline=None)
@given(row=ANY_ROWS | VALUES, system=st.none() | st.just("s"))
def test_any_row_is_an_example_or_refused_with_a_known_reason(row: Any, system: str | None) -> None:
    for format in FORMATS:
        try:
            example = parse(row, format, {}, system=system)
        except RowRefused as refusal:
            assert f"| {refusal.reason} |" in str(parse.__globals__["__doc__"])
            continue
        json.dumps(to_json(example), ensure_ascii=False, allow_nan=False).encode("utf-8")
        assert from_json(to_json(example)) == example


@settings(max_examples=200, deadline=None)
@given(rows=st.lists(ANY_ROWS, max_size=3))
def test_any_rows_are_detected_or_a_data_error(rows: list[dict[str, Any]]) -> None:
    try:
        assert detect(rows) in (*FORMATS, "prompt")
    except DataError as error:
        assert error.hint


ASKED = [Message("user", "How many hours are in a day?")]
PROMPTS: dict[str, tuple[dict[str, Any], str | None]] = {
    "prompt": ({"prompt": "How many hours are in a day?"}, None),
    "question": ({"question": "How many hours are in a day?", "answer": "24"}, "24"),
    "turns": ({"prompt": [{"role": "user", "content": "How many hours are in a day?"}]}, None),
    "messages that end with a question": (
        {"messages": [{"role": "user", "content": "How many hours are in a day?"}]},
        None,
    ),
    "messages that end with an answer": (
        {
            "messages": [
                {"role": "user", "content": "How many hours are in a day?"},
                {"role": "assistant", "content": "24"},
            ]
        },
        "24",
    ),
    "alpaca": ({"instruction": "How many hours are in a day?", "input": "", "output": "24"}, "24"),
    "preference": ({"prompt": "How many hours are in a day?", "chosen": "24", "rejected": "Many."}, None),
    "labelled": ({"prompt": "How many hours are in a day?", "completion": "24", "label": True}, None),
}


@pytest.mark.parametrize(("row", "answer"), PROMPTS.values(), ids=PROMPTS.keys())
def test_what_a_row_asks(row: dict[str, Any], answer: str | None) -> None:
    """Whatever else it brings; its other fields go along, for who scores."""
    row = {**row, "difficulty": 3}
    format_ = detect([row]) if "messages" not in row else "messages"
    found = asked(row, format_, {}, system="Be brief.")
    assert isinstance(found, Prompt)
    assert [Message("system", "Be brief."), *ASKED] == list(found.prompt)
    assert found.answer == answer
    assert found.columns["difficulty"] == 3
    assert not {"prompt", "messages", "instruction"} & found.columns.keys()
    assert from_json(json.loads(json.dumps(to_json(found)))) == found


def test_what_asks_nothing() -> None:
    with pytest.raises(RowRefused, match="wrong_roles"):
        asked({"prompt": [{"role": "assistant", "content": "24"}]}, "prompt", {})
    with pytest.raises(RowRefused, match="missing_column"):
        asked({"text": "24"}, "prompt", {})
    assert isinstance(asked({"text": "A document."}, "text", {}), Document)


def test_other_fields_are_json() -> None:
    odd = {"prompt": "When?", "date": datetime.date(2024, 1, 2), "share": float("nan"), "parts": ({"a": 1},)}
    found = asked(odd, "prompt", {})
    assert isinstance(found, Prompt)
    assert found.columns == {"date": "2024-01-02", "share": "nan", "parts": [{"a": 1}]}


@pytest.mark.parametrize(
    ("value", "wanted"), [(0.5, 0.5), (2, 2.0), ("1e-1", 0.1), (" -3 ", -3.0), (None, None)], ids=repr
)
def test_a_margin_is_a_number(value: Any, wanted: float | None) -> None:
    assert margin_of({"margin": value}, {}) == wanted == margin_of({"gap": value, "margin": "x"}, {"margin": "gap"})
    assert margin_of({}, {}) is None


@pytest.mark.parametrize("value", ["much", "", True, [1], {}, math.inf, "nan", "-inf"], ids=repr)
def test_what_is_no_margin(value: Any) -> None:
    with pytest.raises(RowRefused, match=r"bad_margin: `gap` must be a (finite )?number"):
        margin_of({"gap": value}, {"margin": "gap"})
