"""Text as it comes: the same in whatever pieces, never half a character, never past a stop."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

import families
from tunedock.serve.jobs import Delta, ToolDelta
from tunedock.serve.text import BROKEN, Detokeniser, Parts, Stops, beginning_of, parsed


@pytest.mark.parametrize("family", ["qwen3", "gemma", "mistral", "phi3", "llama3"])
@pytest.mark.parametrize("text", ["Hello, 你好 😀 👩‍👩‍👧 naïve  text\n\n done.", "مرحبا", "a\tb  c", " leading"])
def test_a_stream_says_what_the_whole_says(family: str, text: str) -> None:
    tokenizer = families.tokenizer(family)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    words = Detokeniser(tokenizer)
    pieces = [words.add(token) for token in ids] + [words.rest()]
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    assert not any(BROKEN in piece for piece in pieces)


@given(ids=st.lists(st.integers(0, 560), max_size=60))
def test_also_of_tokens_that_are_no_text(ids: list[int]) -> None:
    tokenizer = families.tokenizer("qwen3")
    words = Detokeniser(tokenizer)
    said = "".join([words.add(token) for token in ids] + [words.rest()])
    assert said == tokenizer.decode(ids, skip_special_tokens=True)


def cut(text: str, places: Sequence[int]) -> list[str]:
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


@given(
    text=st.text("ab<>STOP\n", max_size=60),
    stops=st.lists(st.text("abSTOP\n", min_size=1, max_size=5), max_size=3),
    places=st.lists(st.integers(0, 60), max_size=12),
)
def test_stops_are_met_wherever_a_text_is_cut(text: str, stops: list[str], places: list[int]) -> None:
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    wanted = text[: min(found)[1]] if found else text
    machine = Stops(stops)
    said = "".join(machine.add(piece) for piece in cut(text, places))
    said += "" if machine.met else machine.rest()
    assert (said, machine.met) == (wanted, bool(found))


def test_only_what_could_begin_a_stop_is_held() -> None:
    machine = Stops(["STOP"])
    assert machine.add("no ST") == "no "
    assert machine.add("AR") == "STAR"
    assert beginning_of("xxST", ["STOP", "TOP"]) == 2
    assert beginning_of("xxSTOP", ["STOP"]) == 0


CALL = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
SHAPES = {
    "plain": ("Hello\nworld", "", "Hello\nworld", []),
    "thought": ("<think>\nhm\nwell\n</think>\n\nYes.", "hm\nwell", "Yes.", []),
    "empty thought": ("<think>\n\n</think>\n\nYes.", "", "Yes.", []),
    "never ends": ("<think>\nhm", "hm", "", []),
    "no thought": ("< think>no", "", "< think>no", []),
    "a call": (f"<tool_call>\n{CALL}\n</tool_call>", "", "", ["get_weather"]),
    "text and calls": (
        f"Let me see.\n<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{CALL}\n</tool_call>",
        "",
        "Let me see.",
        ["get_weather", "get_weather"],
    ),
    "thought and call": (f"<think>\nhm\n</think>\n\n<tool_call>\n{CALL}\n</tool_call>", "hm", "", ["get_weather"]),
    "lines after a call": (f"<tool_call>\n{CALL}\n</tool_call>\n\n\nDone.", "", "Done.", ["get_weather"]),
    "cut off": (f"<tool_call>\n{CALL}", "", "", ["get_weather"]),
    "no call": ("<tool_call>\n{oops}\n</tool_call> then", "", "<tool_call>\n{oops}\n</tool_call> then", []),
    "tag in text": ("a <tool b", "", "a <tool b", []),
}


@given(name=st.sampled_from(sorted(SHAPES)), places=st.lists(st.integers(0, 200), max_size=40))
def test_parts_are_the_same_however_they_come(name: str, places: list[int]) -> None:
    text, reasoning, answer, calls = SHAPES[name]
    parts = Parts(0, thinks=True, calls=True)
    events = [event for piece in cut(text, places) for event in parts.add(piece)] + list(parts.rest())
    assert "".join(event.reasoning for event in events if isinstance(event, Delta)) == reasoning
    assert "".join(event.text for event in events if isinstance(event, Delta)) == answer
    told = [event for event in events if isinstance(event, ToolDelta)]
    assert [event.name for event in told if event.name] == calls
    for number in range(len(calls)):
        arguments = "".join(event.arguments for event in told if event.call == number)
        assert json.loads(arguments) == {"city": "Paris"}
    assert len({event.id for event in told if event.id}) == len(calls)


def test_a_thought_that_the_prompt_has_opened() -> None:
    parts = Parts(0, thinks=True, calls=False, inside=True)
    assert parts.thinking
    events = [*parts.add("hm\n</think>\n\nYes"), *parts.rest()]
    assert [(event.reasoning, event.text) for event in events if isinstance(event, Delta)] == [("hm", ""), ("", "Yes")]


def test_where_no_tools_were_offered_tags_are_text() -> None:
    parts = Parts(0, thinks=False, calls=False)
    text = f"<think>x</think><tool_call>{CALL}</tool_call>"
    assert "".join(event.text for event in [*parts.add(text), *parts.rest()] if isinstance(event, Delta)) == text


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"name": 3}', '{"name": "a", "arguments": "x"}', '{"name": "a", "arguments": []}', "[" * 100_000],
)
def test_what_is_no_call(text: str) -> None:
    assert parsed(text) is None


def test_arguments_as_text() -> None:
    assert parsed('{"name": "a", "arguments": "{\\"b\\": 1}"}') == ("a", '{"b": 1}')
    assert parsed('{"name": "a"}') == ("a", "{}")
