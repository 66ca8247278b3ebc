"""Text -> tokens with their places, a piece at a time: what stands in many renderings is tokenised once.

A tokenizer splits a text at its added tokens (`<|im_start|>`) before it does anything else, so the tokens from one to the next are
the same in whatever text they stand. A conversation's renderings (one a trained turn, where the template drops earlier thinking)
repeat each other, and every row repeats the system prompt: their pieces are cut out, made unique, tokenised in one call, and
joined. Where the tokenizer allows, the pieces in their turn are put together of words (`words`).

An added token cuts when its match depends on nothing around it; that the joined pieces are the tokens of the whole
is looked at on the first texts, and where they are not, or no token cuts, the whole text is one piece.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from tunedock.data.sample import Tokens
from tunedock.data.words import Words

PROVEN_TEXTS = 16
"""Texts tokenised both ways before pieces are trusted. For as few in one call, words are not looked for."""

Offset = tuple[int, int]
"""The first character of a token and the one after its last."""


class _Piece(Protocol):
    """The tokens of a stretch of text, and where they stand in it."""

    @property
    def ids(self) -> bytes:
        """int32, in a row."""

    def at(self, character: int) -> int:
        """Index of the first token that reaches beyond a character."""

    def offset(self, token: int) -> Offset: ...


class _Whole:
    """A stretch tokenised at once."""

    def __init__(self, encoding: Any) -> None:
        self._encoding = encoding
        self.ids = np.asarray(encoding.ids, np.int32).tobytes()

    @cached_property
    def _offsets(self) -> list[Offset]:
        """Made when asked for: most pieces are context, and nobody asks."""
        offsets: list[Offset] = self._encoding.offsets
        return offsets

    def at(self, character: int) -> int:
        return bisect_right(self._offsets, character, key=_end)

    def offset(self, token: int) -> Offset:
        return self._offsets[token]


class _Spelled:
    """A stretch put together of words."""

    def __init__(self, words: list[str], ids: list[bytes], offsets: Callable[[str, bool], list[Offset]]) -> None:
        self._words = words
        self._word_ids = ids
        self._offsets = offsets
        self._begins_text = False
        self.ids = b"".join(ids)

    def at_start(self) -> _Spelled:
        """The same, where a text begins with it."""
        made = copy(self)
        made._begins_text = True
        return made

    def at(self, character: int) -> int:
        start = first = 0
        for word, ids in zip(self._words, self._word_ids, strict=True):
            if character < start + len(word):
                offsets = self._offsets(word, self._begins_text and start == 0)
                return first + bisect_right(offsets, character - start, key=_end)
            start, first = start + len(word), first + len(ids) // 4
        return first

    def offset(self, token: int) -> Offset:
        start = first = 0
        for word, ids in zip(self._words, self._word_ids, strict=True):
            if token < first + len(ids) // 4:
                begin, end = self._offsets(word, self._begins_text and start == 0)[token - first]
                return start + begin, start + end
            start, first = start + len(word), first + len(ids) // 4
        raise IndexError(token)


class Tokenised:
    """A text's token ids, and the characters of the text each stands for."""

    __slots__ = ("_firsts", "_pieces", "_starts", "ids_T")

    def __init__(self, pieces: Sequence[_Piece], starts: Sequence[int]) -> None:
        parts = [piece.ids for piece in pieces]
        self.ids_T: Tokens = np.frombuffer(b"".join(parts), np.int32)
        self._pieces = pieces
        self._starts = starts
        """The character each piece begins at."""
        self._firsts: list[int] = []
        """The token each piece begins with."""
        first = 0
        for part in parts:
            self._firsts.append(first)
            first += len(part) // 4

    def __len__(self) -> int:
        return len(self.ids_T)

    def at(self, character: int) -> int:
        """Index of the first token that reaches beyond a character: the one that holds it, or stands next.

        By the tokens' ends, which never decrease: byte tokens of one character share their offsets, and some tokenizers trim the
        whitespace off a token's start.
        """
        number = bisect_right(self._starts, character) - 1
        if number < 0:
            return 0
        return self._firsts[number] + self._pieces[number].at(character - self._starts[number])

    def offset(self, token: int) -> Offset:
        """The first character of a token and the one after its last."""
        number = bisect_right(self._firsts, token) - 1
        start, end = self._pieces[number].offset(token - self._firsts[number])
        return self._starts[number] + start, self._starts[number] + end


def _end(offset: Offset) -> int:
    return offset[1]


@dataclass(frozen=True, slots=True)
class _Cuts:
    """Where a text falls apart for one tokenizer."""

    pattern: re.Pattern[str]
    """Finds added tokens as the tokenizer does: leftmost, then longest."""
    cutting: frozenset[str]
    words: Words | None = None

    def starts(self, text: str) -> Iterator[int]:
        """Where the pieces of a text begin: at an added token that cuts and, where words are looked up, behind it."""
        yield 0
        last = 0
        for match in self.pattern.finditer(text):
            if match.group() in self.cutting:
                if match.start() > last:
                    yield (last := match.start())
                if self.words is not None and match.end() < len(text):
                    yield (last := match.end())


class Pieces:
    """Tokenises texts by their pieces, for one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._cuts, self._may_have_words = _cuts(tokenizer)
        self._unproven = PROVEN_TEXTS

    def encode(self, texts: Sequence[str]) -> list[Tokenised]:
        """All texts in one call: the tokenizer runs on all cores where nothing forbids it."""
        if not texts:
            return []
        self._tokenizer("", verbose=False)  # takes back the padding, truncation and splitting others asked of it
        if len(texts) > PROVEN_TEXTS and self._may_have_words and self._cuts is not None:
            self._may_have_words = False
            self._cuts, self._unproven = replace(self._cuts, words=Words.of(self._backend)), PROVEN_TEXTS
        cuts = self._cuts  # once: another thread may find them wrong meanwhile
        if self._unproven and cuts is not None:
            proof = texts[: self._unproven]
            self._unproven -= len(proof)
            whole = self._whole(proof)
            if not all(_same(a, b) for a, b in zip(self._joined(proof, cuts), whole, strict=True)):
                self._cuts = cuts = None
        return self._whole(texts) if cuts is None else self._joined(texts, cuts)

    def _whole(self, texts: Sequence[str]) -> list[Tokenised]:
        return [Tokenised([piece], [0]) for piece in self._encoded(texts)]

    def _joined(self, texts: Sequence[str], cuts: _Cuts) -> list[Tokenised]:
        starts = [list(cuts.starts(text)) for text in texts]
        stretches = [
            [text[a:b] for a, b in zip(places, [*places[1:], len(text)], strict=True)]
            for text, places in zip(texts, starts, strict=True)
        ]
        unique = list(dict.fromkeys(stretch for row in stretches for stretch in row))
        made = self._made(unique, cuts)
        found: list[Tokenised] = []
        for row, places in zip(stretches, starts, strict=True):
            first, *others = (made[stretch] for stretch in row)
            found.append(Tokenised([first.at_start() if isinstance(first, _Spelled) else first, *others], places))
        return found

    def _made(self, stretches: Sequence[str], cuts: _Cuts) -> dict[str, _Piece]:
        words = cuts.words
        if words is None:
            return dict(zip(stretches, self._encoded(stretches), strict=True))
        added = [stretch for stretch in stretches if stretch in cuts.cutting]
        text = [stretch for stretch in stretches if stretch not in cuts.cutting]
        made: dict[str, _Piece] = dict(zip(added, self._encoded(added), strict=True))
        for stretch, (spelling, ids) in zip(text, words.spell(text), strict=True):
            made[stretch] = _Spelled(spelling, ids, words.offsets)
        return made

    def _encoded(self, texts: Sequence[str]) -> list[_Piece]:
        return [_Whole(encoding) for encoding in self._backend.encode_batch(list(texts), add_special_tokens=False)]


def _cuts(tokenizer: PreTrainedTokenizerBase) -> tuple[_Cuts | None, bool]:
    """None when no added token cuts; and whether every added token does: one that does not may stand within a word."""
    every = [token for token in tokenizer.added_tokens_decoder.values() if token.content]
    # The others are looked for later, in what is left between these.
    added = [token for token in every if not token.normalized]
    cutting = frozenset(token.content for token in added if not token.lstrip and not token.rstrip)
    if not cutting or any(token.single_word for token in added):
        return None, False
    contents = sorted((token.content for token in added), key=len, reverse=True)
    return _Cuts(re.compile("|".join(map(re.escape, contents))), cutting), len(cutting) == len(every)


def _same(a: Tokenised, b: Tokenised) -> bool:
    return np.array_equal(a.ids_T, b.ids_T) and all(a.offset(i) == b.offset(i) for i in range(len(a)))
