"""The texts a chat template puts around turns, found from outside: sentinels are rendered, and what stands between them is read.

    head    everything before the first user text, for each of: with or without a system text, with or without tools
    turns   user_start U user_end, assistant_start A assistant_end, and the header an answer follows

Where one text ends and the next begins cannot be seen in a rendering of both; it is taken from a conversation that ends there.
Whatever boundary is found, texts in a row are those rendered. How a template treats reasoning and calls is in `calls.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tunedock.data.conversation import RowRefused
from tunedock.errors import CheckError
from tunedock.export.ollama.gaps import ANSWERS, SYSTEM, USERS, cut, find_json, shared_start
from tunedock.export.ollama.go_nodes import If, Nodes, Range, Text, Value, common_suffix, join, text
from tunedock.export.ollama.own import Own
from tunedock.export.ollama.probes import CLOCK, WEATHER, assistant, system, user

SystemRole = Literal["own", "refused", "ignored"]
_TOOL_PREFIX = '{"type": "function", "function": '
"""How Jinja's `tojson` begins a tool. Ollama writes JSON without blanks, so as much of a tool as can be is text."""


@dataclass(frozen=True, slots=True)
class Turns:
    user_start: str
    user_end: str
    assistant_start: str
    """Before a text in an earlier turn."""
    silent_start: str
    """The same before an empty text: some templates put a line break before a text only."""
    assistant_end: str
    generation: str


@dataclass(frozen=True, slots=True)
class Head:
    without_tools: Nodes
    system: Nodes
    tools: Nodes
    system_and_tools: Nodes
    system_role: SystemRole
    takes_tools: bool
    """Whether tools are told, as JSON, before the first user text."""
    tools_refused: bool
    """Whether tools change the prompt in a way that is not that."""


def read_turns(own: Own, *, thinking: bool) -> Turns:
    """Raises CheckError where the template does not show plain turns."""
    talk = [user(USERS[0]), assistant(ANSWERS[0]), user(USERS[1]), assistant(ANSWERS[1]), user(USERS[2])]
    order = (USERS[0], ANSWERS[0], USERS[1], ANSWERS[1], USERS[2])
    gaps = cut(_asked(own, talk, thinking=thinking), *order)
    after_user = cut(_whole(own, talk[:1], thinking=thinking), USERS[0])
    after_answer = cut(_whole(own, talk[:2], thinking=thinking), USERS[0], ANSWERS[0])
    if gaps is None:
        raise CheckError(
            "the chat template does not show the texts of a plain conversation one after the other",
            where="model.chat_template",
            hint="serve this model with an engine that reads the template itself",
        )
    user_end = _end(after_user, gaps[5], gaps[3])
    assistant_end = _end(after_answer, gaps[4], gaps[4])
    user_start = gaps[4][len(assistant_end) :]
    start = gaps[3][len(user_end) :]
    silent = cut(own.tried([talk[0], assistant(""), talk[2]], thinking=thinking), USERS[0], USERS[1])
    return Turns(
        user_start, user_end, start, _silent(silent, user_end, assistant_end + user_start, start), assistant_end,
        gaps[5][len(user_end) :],
    )  # fmt: skip


def _asked(own: Own, messages: Sequence[Mapping[str, Any]], *, thinking: bool) -> str:
    try:
        return own.prompt(messages, thinking=thinking)
    except RowRefused as refused:
        raise CheckError(
            f"the chat template refuses a plain conversation: {refused.detail}", where="model.chat_template"
        ) from None


def _whole(own: Own, messages: Sequence[Mapping[str, Any]], *, thinking: bool) -> str | None:
    try:
        return own.whole(messages, thinking=thinking)
    except RowRefused:
        return None


def _end(ended: list[str] | None, followed: str, otherwise: str) -> str:
    """What follows a text whatever comes next: all that stands there when nothing does, less what only an end adds."""
    if ended is not None and followed.startswith(ended[-1]) and otherwise.startswith(ended[-1]):
        return ended[-1]
    return shared_start(followed, otherwise, *(ended[-1:] if ended is not None else ()))


def _silent(gaps: list[str] | None, before: str, after: str, start: str) -> str:
    if gaps is None or not (gaps[1].startswith(before) and gaps[1].endswith(after)):
        return start
    silent = gaps[1][len(before) : len(gaps[1]) - len(after)]
    return silent if start.startswith(silent) else start


# -- the head -------------------------------------------------------------------------------------------------------


def read_head(own: Own, *, thinking: bool) -> Head:
    """Raises CheckError where a plain conversation is refused."""
    plain = _before_user(own, (), with_system=False, thinking=thinking) or ()
    told = _before_user(own, (), with_system=True, thinking=thinking)
    shown = told is not None and _value_of("System") in told
    role: SystemRole = "own" if shown else "refused" if told is None else "ignored"
    with_system = told if told is not None and shown else plain
    if told is None:
        # Ollama's own idiom for Gemma: the system text leads the first user text.
        with_system = join(plain, (_value_of("System"),), text("\n\n"))
    tools = _before_user(own, (WEATHER, CLOCK), with_system=False, thinking=thinking)
    takes_tools = tools is not None and any(isinstance(node, Range) or node == _value_of("Tools") for node in tools)
    if not takes_tools or tools is None:
        changed = own.tried([user(USERS[0])], (WEATHER,), thinking=thinking) != own.tried(
            [user(USERS[0])], thinking=thinking
        )
        return Head(plain, with_system, plain, with_system, role, False, changed)
    both = _before_user(own, (WEATHER, CLOCK), with_system=True, thinking=thinking) if shown else None
    if both is None:
        both = join(tools, (_value_of("System"),), text("\n\n")) if told is None else tools
    return Head(plain, with_system, tools, both, role, True, False)


def _value_of(name: str) -> Value:
    return Value(f"$.{name}")


def _before_user(own: Own, tools: Sequence[Mapping[str, Any]], *, with_system: bool, thinking: bool) -> Nodes | None:
    """What stands before the first user text, tools as a range; None where it is refused or not found."""
    messages = [*([system(SYSTEM)] if with_system else []), user(USERS[0])]
    gaps = cut(own.tried(messages, tools, thinking=thinking), USERS[0])
    if gaps is None:
        return None
    before = _tools_in(gaps[0], tools) if tools else text(gaps[0])
    return join(*(_system_in(node) for node in before))


def _system_in(node: Any) -> Nodes:
    if not isinstance(node, Text) or SYSTEM not in node.value:
        return (node,)
    before, _, after = node.value.partition(SYSTEM)
    return join(text(before), (_value_of("System"),), text(after))


def _tools_in(before: str, tools: Sequence[Mapping[str, Any]]) -> Nodes:
    """The text with its two tools as a range over any number; as it is where they are not found as JSON."""
    for named, wanted in (("json .", list(tools)), ("json .Function", [tool["function"] for tool in tools])):
        whole = find_json(before, wanted)
        if whole is not None and named == "json .":
            return join(text(before[: whole[0]]), (Value("json $.Tools"),), text(before[whole[1] :]))
        spans = [find_json(before, value) for value in wanted]
        if spans[0] is not None and spans[1] is not None and spans[0][1] <= spans[1][0]:
            return _ranged(before, spans[0], spans[1], named)
    return text(before)


def _ranged(before: str, first: tuple[int, int], second: tuple[int, int], named: str) -> Nodes:
    opening, between, closing = before[: first[0]], before[first[1] : second[0]], before[second[1] :]
    item: Nodes = (Value(named),)
    if named == "json ." and before.startswith(_TOOL_PREFIX, first[0]):
        item = join(text(_TOOL_PREFIX), (Value("json .Function"),), text("}"))
    ahead = common_suffix(opening, between)
    behind = between[: len(between) - len(ahead)]
    if not closing.startswith(behind):  # the separator stands between tools only
        body = join((If("$j", text(between)),) if between else (), item)
        return join(text(opening), (Range("$j, $_ := $.Tools", body),), text(closing))
    return join(
        text(opening.removesuffix(ahead)),
        (Range("$.Tools", join(text(ahead), item, text(behind))),),
        text(closing.removeprefix(behind)),
    )
