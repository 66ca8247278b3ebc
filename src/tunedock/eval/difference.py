"""Where an answer departs from its reference: words (CJK: characters) that are extra, and words that are missing.

Words are compared, white space is not. difflib is readable on ordinary text, but cubic where both texts repeat a few words
(88 s for two answers of 3,000 characters), and a model that fails repeats itself. So the work is bounded first, and beyond
the bound a text is shown as it is.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal

from tunedock.eval.metrics import CJK

Kind = Literal["same", "extra", "missing"]

MAX_TOKENS = 3000
"""Of the answer, and of the reference."""
MAX_PAIRS = 200_000
"""Pairs of equal tokens, one from each text. At this bound the worst input found took 0.7 s; ordinary long answers have a tenth."""

_TOKEN = re.compile(rf"\s*(?:[{CJK}]|[^\W{CJK}]+|[^\w\s])(?:\s+\Z)?|\s+\Z")


@dataclass(frozen=True, slots=True)
class Part:
    """A run of text in NFC: `same` and `extra` are the answer's and make it up in full; `missing` is the reference's."""

    kind: Kind
    text: str


def compare(answer: str, reference: str) -> list[Part] | None:
    """The answer in parts, against its reference; None when they are too long or too repetitive to compare."""
    mine, theirs = _tokens(answer), _tokens(reference)
    my_keys, their_keys = [token.strip() for token in mine], [token.strip() for token in theirs]
    if my_keys == their_keys:
        return [Part("same", "".join(mine))] if mine else []
    if max(len(mine), len(theirs)) > MAX_TOKENS or _pairs(my_keys, their_keys) > MAX_PAIRS:
        return None
    parts: list[Part] = []
    steps = SequenceMatcher(None, their_keys, my_keys, autojunk=False).get_opcodes()
    for step, their_start, their_end, my_start, my_end in steps:
        own, wanted = "".join(mine[my_start:my_end]), "".join(theirs[their_start:their_end])
        if step == "equal":
            parts.append(Part("same", own))
            continue
        if wanted:
            parts.append(Part("missing", wanted))
        if own:
            parts.append(Part("extra", own))
    return parts


def _tokens(text: str) -> list[str]:
    """Words, CJK characters and punctuation marks, each with the white space before it; joined they are the text."""
    return _TOKEN.findall(unicodedata.normalize("NFC", text))


def _pairs(first: list[str], second: list[str]) -> int:
    counts, others = Counter(first), Counter(second)
    return sum(count * others[key] for key, count in counts.items())
