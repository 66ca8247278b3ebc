"""A judge's reply -> a number from 0 to 1, or why there is none. Nothing is guessed from text that is not of the form."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from tunedock.data.conversation import RowRefused
from tunedock.data.turns import split_thinking
from tunedock.recipe.objectives.rewards import JudgeReward

LONGEST_REPLY = 1 << 16
"""Characters: more than a judge was allowed to say."""

_BLOCK = re.compile(r"```(?:json)?\s*\n(.*?)\n?\s*```", re.DOTALL)


class NoScore(Exception):  # noqa: N818 - a verdict on one reply, which `Judge` acts on
    """The reply holds no score; the message says why."""


def score_of(reply: Any, reward: JudgeReward) -> float:
    """`reply`: what the client made of the response, of whatever type it is. Raises NoScore."""
    text = _text(reply)
    number = _from_json(text, reward.key) if reward.parse == "json" else _from_match(text, reward.pattern)
    worst, best = reward.scale
    if not min(worst, best) <= number <= max(worst, best):
        raise NoScore(f"the score {number:g} is not between {worst:g} and {best:g}")
    return (number - worst) / (best - worst)


def _text(reply: Any) -> str:
    """What the judge says after its reasoning."""
    choices = getattr(reply, "choices", None)
    if not isinstance(choices, list) or not choices:
        raise NoScore("the reply is no chat completion")
    content = getattr(getattr(choices[0], "message", None), "content", None)
    if not isinstance(content, str) or not content.strip():
        raise NoScore("the reply is empty")
    if getattr(choices[0], "finish_reason", None) == "length":
        raise NoScore("the reply was cut off at `max_tokens`")
    if len(content) > LONGEST_REPLY:
        raise NoScore(f"the reply has more than {LONGEST_REPLY:,} characters")
    try:
        return split_thinking(content, "reply")[1].strip()
    except RowRefused:
        raise NoScore("the reply is reasoning that never ends") from None


def _from_json(text: str, key: str) -> float:
    blocks = _BLOCK.findall(text)
    if len(blocks) > 1:
        raise NoScore(f"the reply has {len(blocks)} code blocks, and one of them should hold the score")
    try:
        value = json.loads(blocks[0] if blocks else text, parse_constant=_refused, object_pairs_hook=_once)
    except (ValueError, RecursionError):
        raise NoScore(f"the reply is no JSON: {_shown(text)}") from None
    if not isinstance(value, dict) or key not in value:
        raise NoScore(f"the reply has no key `{key}`: {_shown(text)}")
    number = value[key]
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise NoScore(f"`{key}` is no number: {_shown(text)}")
    return _finite(number)


def _from_match(text: str, pattern: str) -> float:
    found = {match.group(1) for match in re.finditer(pattern, text)}
    if len(found) != 1:
        many = "says several scores" if found else "matches `pattern` nowhere"
        raise NoScore(f"the reply {many}: {_shown(text)}")
    try:
        return _finite(float(found.pop()))
    except (TypeError, ValueError):
        raise NoScore(f"what `pattern` finds is no number: {_shown(text)}") from None


def _finite(number: float) -> float:
    try:
        value = float(number)
    except OverflowError:
        raise NoScore("the score is too large") from None
    if not math.isfinite(value):
        raise NoScore(f"the score is {value}")
    return value


def _refused(constant: str) -> Any:
    raise ValueError(constant)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key stands twice")
    return value


def _shown(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 80 else line[:79] + "…"
