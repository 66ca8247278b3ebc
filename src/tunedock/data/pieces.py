"""Text -> tokens with their places, a piece at a time: what stands in many renderings is tokenised once.

A tokenizer splits a text at its added tokens (`<|im_start|>`) before it does anything else, so the tokens from one to the next are
the same in whatever text they stand. A conversation's renderings (one a trained turn, where the template drops earlier thinking)
repeat each other, and every row repeats the system prompt: their pieces are cut out, made unique, tokenised in one call, and
joined. An added token cuts when its match depends on nothing around it; that the joined pieces are the tokens of the whole
is looked at on the first texts, and where they are not, or no token cuts, the whole text is one piece.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

Cuts = tuple[re.Pattern[str], frozenset[str]]
"""Finds added tokens; those of them that cut."""

PROVEN_TEXTS = 16
"""Texts tokenised both ways before pieces are trusted."""


class _Piece:
    """The tokens of a stretch of text, and where they stand in it."""

    def __init__(self, encoding: Any) -> None:
        self._encoding = encoding
        self.ids: list[int] = encoding.ids

    @cached_property
    def offsets(self) -> list[tuple[int, int]]:
        """Made when asked for: most pieces are context, and nobody asks."""
        offsets: list[tuple[int, int]] = self._encoding.offsets
        return offsets


class Tokenised:
    """A text's token ids, and the characters of the text each stands for."""

    __slots__ = ("_firsts", "_pieces", "_starts", "ids")

    def __init__(self, pieces: Sequence[_Piece], starts: Sequence[int]) -> None:
        self.ids: list[int] = []
        self._pieces = pieces
        self._starts = starts
        """The character each piece begins at."""
        self._firsts: list[int] = []
        """The token each piece begins with."""
        for piece in pieces:
            self._firsts.append(len(self.ids))
            self.ids += piece.ids

    def at(self, character: int) -> int:
        """Index of the first token that reaches beyond a character: the one that holds it, or stands next.

        By the tokens' ends, which never decrease: byte tokens of one character share their offsets, and some tokenizers trim the
        whitespace off a token's start.
        """
        number = bisect_right(self._starts, character) - 1
        if number < 0:
            return 0
        offsets, place = self._pieces[number].offsets, character - self._starts[number]
        return self._firsts[number] + bisect_right(offsets, place, key=_end)

    def offset(self, token: int) -> tuple[int, int]:
        """The first character of a token and the one after its last."""
        number = bisect_right(self._firsts, token) - 1
        start, end = self._pieces[number].offsets[token - self._firsts[number]]
        return self._starts[number] + start, self._starts[number] + end


def _end(offset: tuple[int, int]) -> int:
    return offset[1]


class Pieces:
    """Tokenises texts by their pieces, for one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._cuts = _cutting(tokenizer)
        self._unproven = PROVEN_TEXTS

    def encode(self, texts: Sequence[str]) -> list[Tokenised]:
        """All texts in one call: the tokenizer runs on all cores where nothing forbids it."""
        if not texts:
            return []
        self._tokenizer("", verbose=False)  # takes back the padding, truncation and splitting others asked of it
        if self._unproven and self._cuts is not None:
            proof = texts[: self._unproven]
            self._unproven -= len(proof)
            whole = self._whole(proof)
            if not all(_same(a, b) for a, b in zip(self._joined(proof, self._cuts), whole, strict=True)):
                self._cuts = None
        return self._whole(texts) if self._cuts is None else self._joined(texts, self._cuts)

    def _whole(self, texts: Sequence[str]) -> list[Tokenised]:
        return [Tokenised([piece], [0]) for piece in self._encoded(texts)]

    def _joined(self, texts: Sequence[str], cuts: Cuts) -> list[Tokenised]:
        starts = [list(_starts(text, *cuts)) for text in texts]
        stretches = [
            [text[a:b] for a, b in zip(places, [*places[1:], len(text)], strict=True)]
            for text, places in zip(texts, starts, strict=True)
        ]
        unique = list(dict.fromkeys(stretch for row in stretches for stretch in row))
        made = dict(zip(unique, self._encoded(unique), strict=True))
        return [
            Tokenised([made[stretch] for stretch in row], places) for row, places in zip(stretches, starts, strict=True)
        ]

    def _encoded(self, texts: Sequence[str]) -> list[_Piece]:
        return [_Piece(encoding) for encoding in self._backend.encode_batch(list(texts), add_special_tokens=False)]


def _starts(text: str, pattern: re.Pattern[str], cutting: frozenset[str]) -> Iterator[int]:
    """Where the pieces of a text begin. All but the first begin with an added token."""
    yield 0
    for match in pattern.finditer(text):
        if match.start() and match.group() in cutting:
            yield match.start()


def _cutting(tokenizer: PreTrainedTokenizerBase) -> Cuts | None:
    """A pattern that finds added tokens as the tokenizer does (leftmost, then longest), and those of them that cut."""
    # The others are looked for later, in what is left between these.
    added = [token for token in tokenizer.added_tokens_decoder.values() if token.content and not token.normalized]
    cutting = frozenset(token.content for token in added if not token.lstrip and not token.rstrip)
    if not cutting or any(token.single_word for token in added):
        return None
    contents = sorted((token.content for token in added), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, contents))), cutting


def _same(a: Tokenised, b: Tokenised) -> bool:
    return a.ids == b.ids and all(a.offset(i) == b.offset(i) for i in range(len(a.ids)))
