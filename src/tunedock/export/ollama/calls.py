"""What a chat template does with tool calls and tool results, found from outside as in `pieces.py`.

The arguments of a call stand there as JSON, or each by its name between tags; a template that shows them otherwise is not read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from tunedock.export.ollama.gaps import ANSWERS, ARGUMENTS, CONTENT, NAMES, RESULTS, USERS, cut, find_json, shared_start
from tunedock.export.ollama.go_nodes import If, Nodes, Range, Set, Text, Value, common_prefix, common_suffix, join, text
from tunedock.export.ollama.own import Own, Tools
from tunedock.export.ollama.pieces import Turns
from tunedock.export.ollama.probes import assistant, result, user


@dataclass(frozen=True, slots=True)
class Calls:
    opening: str
    """Before the first call of a turn."""
    before_name: str
    between: str
    """After a name, before its arguments."""
    arguments: Nodes
    as_json: bool
    """Whether the arguments stand there as JSON, or each by its name."""
    after_arguments: str
    separator: str
    """Between two calls, beside what stands around each."""
    closing: str
    keeps_text: bool
    """Whether the turn's text is shown beside its calls."""
    after_text: str
    """Between the turn's text and its calls."""
    without_text: str
    several: bool
    """Whether a turn may have several calls."""
    ends_turn: bool
    """Whether the end of an assistant turn follows."""


@dataclass(frozen=True, slots=True)
class Results:
    start: str
    """Before the first result of several in a row."""
    next_start: str
    end: str
    """After each result."""
    last_end: str
    """After the last of a row."""
    as_json: bool
    """Whether the result is shown as a JSON string."""
    generation: str
    assistant_start: str
    """What an assistant turn after a result begins with, a think block apart."""


@dataclass(frozen=True, slots=True)
class ToolTurns:
    calls: Calls
    results: Results
    text_start: str
    """What a turn with calls, after the last user text, begins with; without reasoning."""


def read_tool_turns(own: Own, turns: Turns, tools: Tools, *, thinking: bool) -> ToolTurns | None:
    """None where the template shows no calls, or their arguments in no way this knows."""
    return _Reader(own, turns, tools, thinking).read()


class _Reader:
    def __init__(self, own: Own, turns: Turns, tools: Tools, thinking: bool) -> None:
        self._own, self._turns, self._tools, self._thinking = own, turns, tools, thinking

    def _prompt(self, *messages: dict[str, object]) -> str | None:
        return self._own.tried([user(USERS[0]), *messages], self._tools, thinking=self._thinking)

    def read(self) -> ToolTurns | None:
        called = list(zip(NAMES, ARGUMENTS, strict=True))
        answered = result(RESULTS[0], NAMES[0])
        one = _call_gaps(self._prompt(assistant("", called[0]), answered))
        if one is None:
            return None
        before, between, after, end = one.gaps
        before = before.removeprefix(self._turns.user_end)
        worded = _call_gaps(self._prompt(assistant(CONTENT, called[0]), answered), CONTENT)
        text_start, before_calls = self._starts(before, worded)
        opening, after_text, without_text = _opening(before_calls, worded.gaps[1] if worded is not None else None)
        closing, start, ends_turn = self._closing(after, called[0])
        separator, several = self._separator(called)
        calls = Calls(
            "", opening, between, one.arguments, one.as_json, closing, "", "", worded is not None, after_text, without_text,
            several, ends_turn,
        )  # fmt: skip
        if separator is not None:
            calls = _separated(calls, separator)
        return ToolTurns(calls, self._results(called[0], start, end), text_start)

    def _starts(self, before: str, worded: _CallGaps | None) -> tuple[str, str]:
        """What a turn with calls begins with, and what stands from there to its first call when it has no text."""
        if worded is not None:
            start = worded.gaps[0].removeprefix(self._turns.user_end).removesuffix(self._turns.before_text)
            kept = start if before.startswith(start) else shared_start(start, before)
            return start, before[len(kept) :]
        start = shared_start(self._turns.silent_start, before)
        return start, before[len(start) :]

    def _closing(self, after: str, call: tuple[str, dict[str, object]]) -> tuple[str, str, bool]:
        """After the arguments: what closes the calls, what opens a result, and whether the turn's end stands between."""
        turns = self._turns
        answered = cut(self._prompt(assistant("", call), user(USERS[1])), USERS[1])
        followed = answered[0] if answered is not None else ""
        span = _arguments_in(followed, call[1])
        closing = followed[span.end :].removesuffix(turns.user_start) if span is not None else ""
        if span is None or not followed.endswith(turns.user_start) or not after.startswith(closing):
            at = after.find(turns.assistant_end) if turns.assistant_end else -1
            closing = (
                after[: at + len(turns.assistant_end)] if at >= 0 else shared_start(after, closing) if closing else ""
            )
        start = after[len(closing) :]
        if closing.endswith(turns.assistant_end):
            return closing.removesuffix(turns.assistant_end), start, True
        return closing, start, False

    def _separator(self, called: list[tuple[str, dict[str, object]]]) -> tuple[str | None, bool]:
        """Between two calls of a turn, from one's arguments to the other's name."""
        answers = (result(RESULTS[0], NAMES[0]), result(RESULTS[1], NAMES[1], 1))
        rendered = self._prompt(assistant("", *called), *answers)
        first = _arguments_in(rendered or "", called[0][1])
        gaps = cut((rendered or "")[first.end :] if first is not None else None, NAMES[1])
        return (gaps[0], True) if gaps is not None else (None, False)

    def _results(self, call: tuple[str, dict[str, object]], start: str, end: str) -> Results:
        turn = assistant("", call)
        more = [result(RESULTS[at], NAMES[0]) for at in range(3)]
        gaps = cut(self._prompt(turn, *more), *RESULTS)
        answered = cut(
            self._prompt(turn, more[0], assistant(ANSWERS[1]), user(USERS[1])), RESULTS[0], ANSWERS[1], USERS[1]
        )
        last_end, assistant_start = self._last_end(end, answered[1] if answered is not None else None)
        generation = end[len(last_end) :]
        as_json = start.endswith('"') and last_end.startswith('"') and self._shown_as_json(turn)
        if as_json:
            start, last_end = start[:-1], last_end[1:]
        middle = gaps[1] if gaps is not None else None
        if middle is None:
            return Results(start, start, "", last_end, as_json, generation, assistant_start)
        if as_json:
            middle = middle[1:-1]
        each = shared_start(middle, last_end)
        return Results(start, middle[len(each) :], each, last_end[len(each) :], as_json, generation, assistant_start)

    def _last_end(self, end: str, before_answer: str | None) -> tuple[str, str]:
        """What ends a row of results, and what an assistant turn after it begins with."""
        turns = self._turns
        if before_answer is not None and before_answer.endswith(turns.assistant_start):
            last_end = before_answer.removesuffix(turns.assistant_start)
            if end.startswith(last_end):
                return last_end, turns.silent_start
        if before_answer is None:
            return end.removesuffix(turns.generation), turns.silent_start
        last_end = shared_start(before_answer, end)
        return last_end, before_answer[len(last_end) :]

    def _shown_as_json(self, turn: dict[str, object]) -> bool:
        content = 'a "quoted" word'
        return json.dumps(content) in (self._prompt(turn, result(content, NAMES[0])) or "")


@dataclass(frozen=True, slots=True)
class _CallGaps:
    gaps: list[str]
    """[..., after the user text and the words up to the name, up to the arguments, up to the result, to the end]."""
    arguments: Nodes
    as_json: bool


def _call_gaps(rendered: str | None, *words: str) -> _CallGaps | None:
    gaps = cut(rendered, USERS[0], *words, NAMES[0])
    if gaps is None:
        return None
    span = _arguments_in(gaps[-1], ARGUMENTS[0])
    ended = cut(gaps[-1][span.end :], RESULTS[0]) if span is not None else None
    if span is None or ended is None:
        return None
    return _CallGaps([*gaps[1:-1], gaps[-1][: span.start], *ended], span.nodes, span.as_json)


_SPACED: Nodes = (
    Text("{"),
    Set('$comma := ""'),
    Range(
        "$k, $v := .Function.Arguments",
        (Value("$comma"), Value("json $k"), Text(": "), Value("json $v"), Set('$comma = ", "')),
    ),
    Text("}"),
)
"""JSON with a blank after each colon and comma, as Jinja's `tojson` writes it and Go's does not; values that hold others apart."""


@dataclass(frozen=True, slots=True)
class _Arguments:
    start: int
    end: int
    nodes: Nodes
    as_json: bool


def _arguments_in(shown: str, arguments: dict[str, Any]) -> _Arguments | None:
    """Where the arguments stand: as JSON, or each by its name, a text bare and other values as JSON."""
    span = find_json(shown, arguments)
    if span is not None:
        spaced = shown[slice(*span)] == json.dumps(arguments)
        return _Arguments(*span, _SPACED if spaced else (Value("json .Function.Arguments"),), True)
    (first, first_value), (second, second_value) = arguments.items()
    gaps = cut(shown, first, str(first_value), second, str(second_value))
    if gaps is None or gaps[1] != gaps[3]:
        return None
    ahead = common_suffix(gaps[0], gaps[2])
    ahead = ahead[ahead.find("<") :] if "<" in ahead else ""
    behind = gaps[2].removesuffix(ahead)
    if not gaps[4].startswith(behind):
        return None
    value = If('eq (printf "%T" $v) "string"', (Value("$v"),), (Value("json $v"),))
    item = join(text(ahead), (Value("$k"), Text(gaps[1]), value), text(behind))
    start, end = len(gaps[0]) - len(ahead), len(shown) - len(gaps[4]) + len(behind)
    return _Arguments(start, end, (Range("$k, $v := .Function.Arguments", item),), False)


def _opening(without: str, worded: str | None) -> tuple[str, str, str]:
    """(before the first call, beside it after a text, beside it without one)."""
    if worded is None:
        return without, "", ""
    opening = without if worded.endswith(without) else common_suffix(without, worded)
    return opening, worded.removesuffix(opening), without.removesuffix(opening)


def _separated(calls: Calls, between_calls: str) -> Calls:
    """What stands before and after every call, told from what opens and closes them all. `between_calls`: arguments to name."""
    before_name = common_suffix(calls.before_name, between_calls)
    rest = between_calls.removesuffix(before_name)
    after_arguments = common_prefix(rest, calls.after_arguments)
    return replace(
        calls,
        opening=calls.before_name.removesuffix(before_name),
        before_name=before_name,
        after_arguments=after_arguments,
        separator=rest.removeprefix(after_arguments),
        closing=calls.after_arguments.removeprefix(after_arguments),
    )
