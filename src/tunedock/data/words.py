"""Text -> words whose tokens do not depend on their neighbours, so that a word that was tokenised once is looked up.

Byte-level BPE splits a text into words by a pattern before it merges anything, and most words of a corpus are ones it had before:
looking them up is ten times faster than merging them again. A word here ends before a space that follows something else than a
space, and, where the tokenizer's pattern allows, behind a line's end. Whether the tokenizer splits there too, whatever stands left
and right, is looked at once, on every combination of kinds of characters; where it does not (SentencePiece's tokenizers merge
across spaces or put one in front), nothing is looked up.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import product
from typing import Any, Self

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import NFC

MOST_CHARACTERS = 1 << 24
"""Of the words kept: 16 million are some hundred megabytes."""

# Equal to splitting at `(?<=\S)(?= )`, and at `(?<=\n)(?=\w)` too, in half the time: words are matched, not the places between.
_AT_SPACES = r"(?: ?\S+|\s*\S+|\s+)(?:[^\S ]\s*\S+)*(?:[^\S ]\s*\Z)?"
_AT_LINES = (
    r"(?: ?\S+|\s*\n(?=\w)|\s*\S+|\s+)"
    r"(?:[^\S ]\s*(?:(?<!\n)|(?!\w))\S+)*"
    r"(?:[^\S ]\s*(?:(?<=\n)(?=\w)|\Z))?"
)
# Kinds of characters beside a gap, and gaps.
_LEFT = (*"aZé你7٣._/-'$\\)", "...", "'s", "👍", "e\u0301", "\u200d")
_RIGHT = (*"aZé你7٣._/-'$\\(", "...", "'s", "'LL", "👍", "\u0301", "\u200d")
_GAPS = (
    *(" ", "  ", "    ", "\t", " \t", "\t ", "\u00a0", " \u00a0", "\u3000 ", "\x1c ", "\u2028 "),
    *("\n", "\n\n", " \n", "\n ", " \n\n ", "\r\n", "\r\n\r\n"),
)


class Words:
    """The tokens of words, for one tokenizer. `known` maps a word to its ids, int32 in a row of bytes."""

    def __init__(self, backend: Tokenizer, pattern: re.Pattern[str]) -> None:
        self._backend = backend
        self._pattern = pattern
        self._known: dict[str, bytes] = {}
        self._characters = 0
        self.offsets = lru_cache(maxsize=4096)(self._offsets)

    @classmethod
    def of(cls, backend: Tokenizer) -> Self | None:
        """None for a tokenizer whose words cannot be told apart from outside."""
        if type(backend.model) is not BPE or backend.model.dropout or backend.pre_tokenizer is None:
            return None
        if backend.normalizer is not None and type(backend.normalizer) is not NFC:
            return None
        for pattern in (_AT_LINES, _AT_SPACES):
            words = re.compile(pattern)
            if _splits_there(backend, words):
                return cls(backend, words)
        return None

    def spell(self, texts: Sequence[str]) -> list[tuple[list[str], list[bytes]]]:
        """The words of each text, and their ids."""
        if self._characters > MOST_CHARACTERS:
            self._known.clear()
            self._characters = 0
        words = [self._pattern.findall(text) for text in texts]
        found = [list(map(self._known.get, row)) for row in words]
        lacking = [number for number, ids in enumerate(found) if None in ids]
        self._learn(
            {word for number in lacking for word, ids in zip(words[number], found[number], strict=True) if ids is None}
        )
        for number in lacking:
            found[number] = list(map(self._known.get, words[number]))
        return list(zip(words, found, strict=True))  # type: ignore[arg-type] # every word is known by now

    def _learn(self, words: Iterable[str]) -> None:
        unknown = list(words)
        self._characters += sum(map(len, unknown))
        for word, encoding in zip(unknown, self._encoded(unknown), strict=True):
            self._known[word] = np.asarray(encoding.ids, np.int32).tobytes()

    def _encoded(self, words: list[str]) -> list[Any]:
        return self._backend.encode_batch_fast(words, add_special_tokens=False)

    def _offsets(self, word: str, begins_text: bool) -> list[tuple[int, int]]:
        """Where each of the word's tokens begins and ends, in characters.

        Tokenizers that trim blanks off the places they tell do it otherwise where a text begins.
        """
        encode = self._backend.encode
        if begins_text or not word[:1].isspace():
            offsets: list[tuple[int, int]] = encode(word, add_special_tokens=False).offsets
            return offsets
        before = encode("x", add_special_tokens=False)
        behind = encode("x" + word, add_special_tokens=False).offsets[len(before.ids) :]
        return [(start - 1, end - 1) for start, end in behind]


def _splits_there(backend: Tokenizer, words: re.Pattern[str]) -> bool:
    """Whether the tokenizer's own words never reach across two of these, and do not depend on what stands in the other."""
    split = backend.pre_tokenizer.pre_tokenize_str
    for left, gap, right in product(_LEFT, _GAPS, _RIGHT):
        text = f"x{left}{gap}{right}y"
        apart = [part for word in words.findall(text) for part, _ in split(word)]
        if apart != [part for part, _ in split(text)]:
            return False
    return True
