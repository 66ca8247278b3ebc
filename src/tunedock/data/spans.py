"""From characters to tokens: which tokens of a rendering are answers, and how a path that is too long is cut.

An answer's tokens are found by their character offsets in the rendering (`pieces`). Two things are proven for
each answer, or the row is refused: no token straddles the boundary between prompt and answer, and the tokens before it are the very
tokens of the prompt alone, so serving feeds the model what training did.

Shape: T tokens of a path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from transformers import PreTrainedTokenizerBase

from tunedock.data.conversation import RowRefused
from tunedock.data.pieces import Pieces, Tokenised
from tunedock.data.sample import Tokens, Weights


@dataclass(frozen=True, slots=True)
class Span:
    """An answer among the tokens of a path: `first` to `end`, `end` not included."""

    first: int
    end: int
    header: int
    """Where the generation header begins. It stays with its answer, or the answer is not trained."""
    weight: float


@dataclass(frozen=True, slots=True)
class Path:
    tokens_T: Tokens
    weights_T: Weights
    spans: tuple[Span, ...]
    """In order; the last one ends the path but for what the template writes after its stop token."""
    bos: int
    """1 when the path begins with BOS, else 0."""
    has_stop: bool = True

    def __len__(self) -> int:
        return len(self.tokens_T)

    def window(self, start: int, end: int) -> Path:
        """BOS and the tokens from `start` to `end`. Answers that lose their header or part of it become context."""
        kept_T = np.concatenate([np.arange(self.bos), np.arange(max(start, self.bos), end)])
        shift = max(start, self.bos) - self.bos
        weights_T = self.weights_T.copy()
        spans: list[Span] = []
        for span in self.spans:
            if span.header < start:
                weights_T[span.first : span.end] = 0.0
            elif span.first < end:
                cut = min(span.end, end)
                spans.append(Span(span.first - shift, cut - shift, span.header - shift, span.weight))
        whole = self.has_stop and end >= self.spans[-1].end
        return replace(
            self, tokens_T=self.tokens_T[kept_T], weights_T=weights_T[kept_T], spans=tuple(spans), has_stop=whole
        )


def fit(paths: Sequence[Path], max_length: int) -> list[Path]:
    """Paths of at most `max_length` tokens that keep the end of their last answer, its header, and BOS.

    Cut, in this order: what follows the stop token; the prompt from the left, at the same place in all `paths` (the completions
    of a preference share their prompt); the answer from the right, which then has no stop. Raises RowRefused when the header and
    one token of the answer do not fit.
    """
    if all(len(path) <= max_length for path in paths):
        return list(paths)
    ends = [path.spans[-1].end for path in paths]
    start = max(path.bos + end - max_length for path, end in zip(paths, ends, strict=True))
    anchor = min((path.spans[-1] if len(paths) == 1 else path.spans[0]).header for path in paths)
    start = max(0, min(start, anchor))
    fitted = []
    for path, end in zip(paths, ends, strict=True):
        first = path.bos if start <= path.bos else start
        room = max_length - path.bos + first
        if room <= path.spans[-1].first:
            header = path.spans[-1].first - first
            raise RowRefused(
                "over_length", f"the prompt's last {header} tokens and one of the answer exceed max_length {max_length}"
            )
        fitted.append(path.window(start if start > path.bos else 0, min(end, room)))
    return fitted


class Spans:
    """Finds answers among tokens, for one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._pieces = Pieces(tokenizer)
        self._added = {index: token.content for index, token in tokenizer.added_tokens_decoder.items()}
        self._alone = lru_cache(maxsize=1024)(self._encode)

    def encode(self, texts: Sequence[str]) -> list[Tokenised]:
        """The tokens of rendered conversations, as they stand: none is added."""
        return self._pieces.encode(texts)

    def document_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of plain texts, with those the tokenizer itself puts around a text."""
        if not texts:
            return []
        ids: list[list[int]] = self._tokenizer(
            list(texts), return_attention_mask=False, return_token_type_ids=False, verbose=False
        )["input_ids"]
        return ids

    def answer(self, found: Tokenised, text: str, start: int) -> int:
        """Index of the first token of the answer that begins at character `start`.

        Raises RowRefused when the tokens before it are not those of the prompt alone.
        """
        first = found.at(start)
        if first < len(found):
            begin, end = found.offset(first)
            if begin < start:
                raise RowRefused("prompt_not_prefix", _straddles(text[begin:end], text[start : start + 1]))
        # Added tokens are split off before anything else, so the tokens up to the last one cannot depend on what follows.
        last_added = next((i for i in range(first - 1, -1, -1) if int(found.ids_T[i]) in self._added), None)
        if last_added is None:
            alone, since = self._alone(text[:start]), 0
        else:
            since = found.offset(last_added)[1]
            alone = self._alone(self._added[int(found.ids_T[last_added])] + text[since:start])[1:]
        if alone != tuple(found.ids_T[0 if last_added is None else last_added + 1 : first].tolist()):
            raise RowRefused(
                "prompt_not_prefix", _straddles(text[max(since, start - 8) : start + 8], text[start : start + 1])
            )
        return first

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _straddles(token: str, begins: str) -> str:
    cause = (
        "the answer begins with whitespace: strip it"
        if begins.isspace()
        else "the prompt and the answer are one word there"
    )
    return f"the token {token!r} holds the end of the prompt and the beginning of the answer; {cause}"
