"""How near generated answers come to their references: exact match, ROUGE and BLEU, for English and Chinese alike.

ROUGE comes from the rouge-score library and BLEU from sacrebleu, so the figures compare with published ones. rouge-score's
own tokenizer keeps only a-z and 0-9, so a Chinese answer would score 0 whatever it says; here each CJK character is a token,
and on plain English text the tokens are the library's own. Scores per row tell where a model fails; BLEU over all rows is no
mean of theirs.

Units: exact match and ROUGE (F1) from 0 to 1, BLEU from 0 to 100.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean
from typing import Any, Literal

from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU

BleuTokenizer = Literal["13a", "zh"]
"""sacrebleu's names: `13a` for text with spaces between words, `zh` splits Chinese by character."""

CJK = "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
"""A regular expression's class of the scripts written without spaces: Han with its extensions, and kana. Hangul has spaces."""
_TOKEN = re.compile(rf"[{CJK}]|[^\W_{CJK}]+")
_IS_CJK = re.compile(rf"[{CJK}]")


@dataclass(frozen=True, slots=True)
class RowScores:
    """One answer against its reference."""

    exact_match: bool
    rouge1: float
    rouge2: float
    rougeL: float
    bleu: float
    """Sentence BLEU with the effective order, so that a short right answer scores 100."""

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class GenerationScores:
    """All answers against their references. With no rows every figure is NaN: a mean over nothing."""

    exact_match: float
    """Share of the rows."""
    rouge1: float
    """Mean of the rows, as `rouge2` and `rougeL`."""
    rouge2: float
    rougeL: float
    bleu: float
    """Corpus BLEU: n-gram counts summed over the rows."""
    bleu_tokenize: BleuTokenizer
    rows: tuple[RowScores, ...]
    """In the order of the predictions."""

    def to_json(self) -> dict[str, Any]:
        """The figures over all rows, NaN as null; the rows have a `to_json` each."""
        figures = {name: getattr(self, name) for name in self.__slots__ if name != "rows"}
        return {name: None if isinstance(v, float) and math.isnan(v) else v for name, v in figures.items()}


def score(predictions: Sequence[str], references: Sequence[str]) -> GenerationScores:
    """Scores answers, one reference each. Raises ValueError when there are not as many of the one as of the other."""
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
    tokenize = bleu_tokenizer(references)
    answers, wanted = [_plain(text) for text in predictions], [_plain(text) for text in references]
    rows = tuple(_row(answer, reference, tokenize) for answer, reference in zip(answers, wanted, strict=True))
    return GenerationScores(
        exact_match=_mean([row.exact_match for row in rows]),
        rouge1=_mean([row.rouge1 for row in rows]),
        rouge2=_mean([row.rouge2 for row in rows]),
        rougeL=_mean([row.rougeL for row in rows]),
        bleu=_bleu(BLEU(tokenize=tokenize).corpus_score(answers, [wanted])) if rows else math.nan,
        bleu_tokenize=tokenize,
        rows=rows,
    )


def exact_match(prediction: str, reference: str) -> bool:
    """Whether the texts are the same but for white space around them and for how Unicode spells a character (NFC)."""
    return _plain(prediction) == _plain(reference)


def bleu_tokenizer(references: Sequence[str]) -> BleuTokenizer:
    """`zh` when at least half of the references' tokens are CJK characters, else `13a`. Predictions have no say, so that two
    models are measured by one rule."""
    tokens = [token for text in references for token in tokens_of(text)]
    cjk = sum(_IS_CJK.match(token) is not None for token in tokens)
    return "zh" if tokens and cjk * 2 >= len(tokens) else "13a"


def tokens_of(text: str) -> list[str]:
    """ROUGE's tokens: words in lower case, and CJK characters one by one; punctuation is left out."""
    return _TOKEN.findall(unicodedata.normalize("NFC", text).lower())


class _Tokenizer:
    """What rouge-score calls."""

    def tokenize(self, text: str) -> list[str]:
        return tokens_of(text)


@cache
def _rouge() -> Any:
    return RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=_Tokenizer())


@cache
def _sentence_bleu(tokenize: BleuTokenizer) -> Any:
    return BLEU(tokenize=tokenize, effective_order=True)


def _row(answer: str, reference: str, tokenize: BleuTokenizer) -> RowScores:
    rouge = _rouge().score(target=reference, prediction=answer)
    return RowScores(
        exact_match=answer == reference,
        rouge1=float(rouge["rouge1"].fmeasure),
        rouge2=float(rouge["rouge2"].fmeasure),
        rougeL=float(rouge["rougeL"].fmeasure),
        bleu=_bleu(_sentence_bleu(tokenize).sentence_score(answer, [reference])),
    )


def _bleu(result: Any) -> float:
    return min(float(result.score), 100.0)  # sacrebleu gives 100.00000000000004 for equal texts


def _plain(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip()


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else math.nan
