"""The texts a chat template puts around turns, found from outside: sentinels are rendered, and what stands between them is read.

    head    what stands before the first user text, and before the last, with a system text and tools or without
    turns   user_start U user_end, assistant_start A assistant_end, and the header an answer follows

Where one text ends and the next begins cannot be seen in a rendering of both; it is taken from a conversation that ends there.
Whatever boundary is found, texts in a row are those rendered. Calls and results are in `calls.py`, reasoning is in `reasoning.py`.
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
from tunedock.export.ollama.probes import CLOCK, WEATHER, assistant, result, system, user

SystemRole = Literal["own", "refused", "ignored"]
ToolsRole = Literal["told", "ignored", "otherwise"]
"""`otherwise`: they change the prompt, but stand in it as no JSON before a user text."""
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

    @property
    def before_text(self) -> str:
        """What stands before the text of an assistant turn only where it has one."""
        return self.assistant_start[len(self.silent_start) :]


@dataclass(frozen=True, slots=True)
class Cases:
    """A text for each of: with or without a system text, with or without tools."""

    plain: Nodes
    system: Nodes
    tools: Nodes
    both: Nodes


@dataclass(frozen=True, slots=True)
class Head:
    first: Cases
    """Before the first user text."""
    last: Cases
    """Before the last user text, where it is not the first: the start of a user turn, and what Mistral puts there."""
    system_role: SystemRole
    tools_role: ToolsRole
    system_with_last_message: bool
    """What stands before the last user text does so only while that is the last message."""
    tools_with_last_message: bool


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

_NONE: Sequence[Mapping[str, Any]] = ()
_BOTH = (WEATHER, CLOCK)


def read_head(own: Own, turns: Turns, *, thinking: bool) -> Head:
    """Where a system text and tools stand."""
    seen = _Seen(own, turns, thinking)
    plain = seen.before(_NONE, with_system=False) or ((), text(turns.user_start))
    told = seen.before(_NONE, with_system=True)
    tools = seen.before(_BOTH, with_system=False)
    shows_system = told is not None and any(_SYSTEM in nodes for nodes in told)
    shows_tools = tools is not None and any(isinstance(node, Range) for nodes in tools for node in nodes)
    with_system = told if told is not None and shows_system else plain
    with_tools = tools if tools is not None and shows_tools else plain
    both = seen.before(_BOTH, with_system=True) if shows_system and shows_tools else None
    if both is None:
        both = with_tools if shows_tools else with_system
    if told is None:  # Ollama's own idiom for Gemma: the system text leads the first user text
        with_system = (join(with_system[0], (_SYSTEM,), text("\n\n")), with_system[1])
        both = (join(both[0], (_SYSTEM,), text("\n\n")), both[1])
    cases = zip(plain, with_system, with_tools, both, strict=True)
    first, last = (Cases(*four) for four in cases)
    return Head(
        first,
        last,
        "own" if shows_system else "refused" if told is None else "ignored",
        "told" if shows_tools else "otherwise" if seen.changed_by_tools() else "ignored",
        shows_system and last.system != last.plain and not seen.beside_result(_NONE, with_system=True),
        shows_tools and last.tools != last.plain and not seen.beside_result(_BOTH, with_system=False),
    )


_SYSTEM = Value("$.System")


class _Seen:
    """A conversation of two user texts, rendered with and without a system text and tools."""

    def __init__(self, own: Own, turns: Turns, thinking: bool) -> None:
        self._own, self._turns, self._thinking = own, turns, thinking

    def before(self, tools: Sequence[Mapping[str, Any]], *, with_system: bool) -> tuple[Nodes, Nodes] | None:
        """What stands before the first and before the last user text; None where it is refused or not found."""
        told = [user(USERS[0]), assistant(ANSWERS[0]), user(USERS[1])]
        rendered = self._own.tried([*_system(with_system), *told], tools, thinking=self._thinking)
        gaps = cut(rendered, USERS[0], ANSWERS[0], USERS[1])
        if gaps is None:
            return None
        first, last = gaps[0], gaps[2].removeprefix(self._turns.assistant_end)
        return _with_values(first, tools), _with_values(last, tools)

    def changed_by_tools(self) -> bool:
        asked = [user(USERS[0])]
        return self._own.tried(asked, _BOTH, thinking=self._thinking) != self._own.tried(asked, thinking=self._thinking)

    def beside_result(self, tools: Sequence[Mapping[str, Any]], *, with_system: bool) -> bool:
        """Whether it still stands there when a result is the last message; so it is said to where results are refused."""
        turn = [user(USERS[0]), assistant("", ("f", {})), result("1", "f")]
        rendered = self._own.tried([*_system(with_system), *turn], tools, thinking=self._thinking)
        shown = self._own.tried(turn, thinking=self._thinking)
        return rendered is None or rendered != shown


def _system(wanted: bool) -> list[dict[str, Any]]:
    return [system(SYSTEM)] if wanted else []


def _with_values(before: str, tools: Sequence[Mapping[str, Any]]) -> Nodes:
    nodes = _tools_in(before, tools) if tools else text(before)
    return join(*(_system_in(node) for node in nodes))


def _system_in(node: Any) -> Nodes:
    if not isinstance(node, Text) or SYSTEM not in node.value:
        return (node,)
    before, _, after = node.value.partition(SYSTEM)
    return join(text(before), (_SYSTEM,), text(after))


def _tools_in(before: str, tools: Sequence[Mapping[str, Any]]) -> Nodes:
    """The text with its two tools as a range over any number; as it is where they are not found as JSON."""
    for named, wanted in (("json .", list(tools)), ("json .Function", [tool["function"] for tool in tools])):
        first, second = (find_json(before, value) for value in wanted)
        if first is not None and second is not None and first[1] <= second[0]:
            return _ranged(before, first, second, named)
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
