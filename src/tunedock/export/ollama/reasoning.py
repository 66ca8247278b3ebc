"""Where a chat template shows reasoning, found from outside as in `pieces.py`.

A turn after the last user text is its own case: most families show reasoning there only, some open an empty think block.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tunedock.export.ollama.calls import ToolTurns
from tunedock.export.ollama.gaps import ANSWERS, ARGUMENTS, CONTENT, NAMES, REASONING, RESULTS, USERS, cut, shared_start
from tunedock.export.ollama.own import Own, Tools
from tunedock.export.ollama.pieces import Turns
from tunedock.export.ollama.probes import assistant, result, user

_CLOSING_TAG = re.compile(r"\s*</([^<>\s]+)>")


@dataclass(frozen=True, slots=True)
class Thinking:
    """The think block between the start of an assistant turn and its text. None: reasoning is not shown there."""

    start: str
    """What every assistant turn begins with."""
    earlier_plain: str
    """Before the text of an earlier turn without reasoning: an empty block, or nothing."""
    last_plain: str
    earlier: tuple[str, str] | None
    """Around the reasoning of an earlier turn."""
    last: tuple[str, str] | None


def read_thinking(own: Own, turns: Turns, tool_turns: ToolTurns | None, tools: Tools, *, thinking: bool) -> Thinking:
    """Where reasoning is shown, and what stands there when there is none."""
    earlier = cut(
        own.tried([user(USERS[0]), assistant(ANSWERS[0], reasoning=REASONING), user(USERS[1])], thinking=thinking),
        USERS[0], REASONING, ANSWERS[0], USERS[1],
    )  # fmt: skip
    call = assistant(CONTENT, (NAMES[0], ARGUMENTS[0]), reasoning=REASONING)
    last = cut(
        own.tried([user(USERS[0]), call, result(RESULTS[0], NAMES[0])], tools, thinking=thinking),
        USERS[0], REASONING, CONTENT, RESULTS[0],
    )  # fmt: skip
    earlier_plain = turns.silent_start
    shown_earlier = _around(earlier, turns)
    shown_last = _around(last, turns) if tool_turns is not None else None
    last_plain = earlier_plain
    if tool_turns is not None and tool_turns.calls.keeps_text:
        last_plain = tool_turns.text_start
    shown = [around for around in (shown_earlier, shown_last) if around is not None]
    start = shared_start(earlier_plain, last_plain, *(opening for opening, _ in shown))
    for opening, closing in shown:
        start = _without_tag(start, opening, closing)
    cut_off = len(start)
    return Thinking(
        start,
        earlier_plain[cut_off:],
        last_plain[cut_off:],
        (shown_earlier[0][cut_off:], shown_earlier[1]) if shown_earlier is not None else None,
        (shown_last[0][cut_off:], shown_last[1]) if shown_last is not None else None,
    )


def _around(gaps: list[str] | None, turns: Turns) -> tuple[str, str] | None:
    return None if gaps is None else (gaps[1].removeprefix(turns.user_end), gaps[2].removesuffix(turns.before_text))


def _without_tag(start: str, opening: str, closing: str) -> str:
    """The start less a tag that the think block closes: Ollama finds the tags around `.Thinking`."""
    closed = _CLOSING_TAG.match(closing)
    tag = f"<{closed[1]}>" if closed is not None else ""
    inside = tag in start and tag not in opening[len(start) :]
    return start[: start.rfind(tag)] if tag and inside else start
