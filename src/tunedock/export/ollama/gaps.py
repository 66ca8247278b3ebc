"""A rendering cut at sentinels: words no template has, whose places tell where its texts stand."""

from __future__ import annotations

import json
import re
from typing import Any

from tunedock.export.ollama.go_nodes import common_prefix

SYSTEM, REASONING, CONTENT = "Sone7q", "Rone7q", "Cone7q"
USERS = ("Uone7q", "Utwo7q", "Uthree7q")
ANSWERS = ("Aone7q", "Atwo7q")
NAMES = ("Fone7q", "Ftwo7q")
ARGUMENTS: tuple[dict[str, Any], ...] = (
    {"kone7q": "xone7q", "lone7q": 710817},
    {"ktwo7q": "xtwo7q", "ltwo7q": 720817},
)
RESULTS = ("Tone7q", "Ttwo7q", "Tthree7q")


def cut(text: str | None, *sentinels: str) -> list[str] | None:
    """The texts before, between and after the sentinels; None unless each stands in the text once, in this order."""
    if text is None:
        return None
    gaps, at = [], 0
    for sentinel in sentinels:
        found = text.find(sentinel, at)
        if found < 0 or text.count(sentinel) != 1:
            return None
        gaps.append(text[at:found])
        at = found + len(sentinel)
    return [*gaps, text[at:]]


def find_json(text: str, value: Any, start: int = 0) -> tuple[int, int] | None:
    """Where a JSON value equal to `value` stands in the text, however it is spaced."""
    decoder = json.JSONDecoder()
    for opened in re.finditer(r"[{\[]", text[start:]):
        at = start + opened.start()
        try:
            found, end = decoder.raw_decode(text, at)
        except ValueError:
            continue
        if found == value:
            return at, end
    return None


def shared_start(*texts: str) -> str:
    """What the texts begin with alike, up to the end of a tag or a line where they part within one."""
    shared = common_prefix(*texts)
    if all(text == shared for text in texts) or shared in texts:
        return shared
    return shared[: max(shared.rfind(">"), shared.rfind("\n")) + 1]
