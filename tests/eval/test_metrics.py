from __future__ import annotations

import math
import unicodedata

import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from tunedock.eval.metrics import bleu_tokenizer, exact_match, score, tokens_of

PREDICTIONS = [
    "The cat sat on the mat, and then it slept for 2 hours.",
    "the U.S. economy grew 3.5% in the first quarter of the year",
    "I do not know.",
    "",
]
REFERENCES = [
    "A cat sat on the mat and slept for two hours.",
    "The U.S. economy grew by 3.5 percent in the first quarter.",
    "I do not know.",
    "Something should stand here.",
]


def test_english_figures_are_the_libraries_own() -> None:
    scores = score(PREDICTIONS, REFERENCES)

    rouge = RougeScorer(["rouge1", "rouge2", "rougeL"])
    theirs = [rouge.score(reference, answer) for answer, reference in zip(PREDICTIONS, REFERENCES, strict=True)]
    for name in ("rouge1", "rouge2", "rougeL"):
        wanted = [row[name].fmeasure for row in theirs]
        assert [getattr(row, name) for row in scores.rows] == pytest.approx(wanted)
        assert getattr(scores, name) == pytest.approx(sum(wanted) / 4)
    assert scores.bleu == pytest.approx(sacrebleu.corpus_bleu(PREDICTIONS, [REFERENCES]).score)
    assert scores.bleu_tokenize == "13a"
    sentences = [sacrebleu.sentence_bleu(a, [r]).score for a, r in zip(PREDICTIONS, REFERENCES, strict=True)]
    assert [row.bleu for row in scores.rows] == pytest.approx(sentences)
    assert scores.exact_match == 0.25


def test_chinese_counts_characters() -> None:
    # prediction 今天天气好 (5 characters), reference 今天的天气很好 (7).
    # rouge1: 5 shared; P 5/5, R 5/7, F 10/12. rouge2: 今天 天气 shared of 4 and 6; F 2*2/(4+6).
    # rougeL: 今天天气好 is a subsequence; F 10/12.
    scores = score(["今天天气好。"], ["今天的天气很好！"])
    assert scores.rouge1 == pytest.approx(10 / 12)
    assert scores.rouge2 == pytest.approx(4 / 10)
    assert scores.rougeL == pytest.approx(10 / 12)
    assert scores.bleu_tokenize == "zh"


def test_chinese_bleu_by_hand() -> None:
    # 一二三四五六 against 一二三四五七: 5/6, 4/5, 3/4, 2/3; product 1/3; equal lengths, no brevity penalty.
    scores = score(["一二三四五六"], ["一二三四五七"])
    assert scores.bleu == pytest.approx(100 * (1 / 3) ** 0.25)
    assert scores.rows[0].bleu == pytest.approx(scores.bleu)


def test_the_default_tokenizer_would_have_dropped_chinese() -> None:
    default = RougeScorer(["rouge1"]).score("今天天气好", "今天天气好")["rouge1"].fmeasure
    assert default == 0.0
    assert score(["今天天气好"], ["今天天气好"]).rouge1 == 1.0


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("GPT-4 很好用!", ["gpt", "4", "很", "好", "用"]),
        ("café_au lait", ["café", "au", "lait"]),
        ("𠮷野家です", ["𠮷", "野", "家", "で", "す"]),
        ("안녕 세계", ["안녕", "세계"]),
        ("……！", []),
    ],
)
def test_tokens(text: str, tokens: list[str]) -> None:
    assert tokens_of(text) == tokens


def test_exact_match_ignores_spelling_of_characters_and_outer_space() -> None:
    assert exact_match("  café\n", unicodedata.normalize("NFD", "café"))
    assert not exact_match("cafe", "café")
    assert not exact_match("a  b", "a b")
    scores = score([unicodedata.normalize("NFD", "café au lait chaud")], ["café au lait chaud"])
    assert (scores.exact_match, scores.rouge2, scores.bleu) == (1.0, 1.0, 100.0)


def test_bleu_tokenizer_follows_the_references() -> None:
    assert bleu_tokenizer(["用 Python 写", "hello"]) == "zh"
    assert bleu_tokenizer(["please explain what the word 你好 means"]) == "13a"
    assert bleu_tokenizer([]) == "13a"
    assert score(["English words only"], ["只有中文"]).bleu_tokenize == "zh"


def test_empty_answers_and_no_answers() -> None:
    empty = score(["", ""], ["a b c d", "甲乙丙丁"])
    assert (empty.exact_match, empty.rouge1, empty.rougeL, empty.bleu) == (0.0, 0.0, 0.0, 0.0)
    nothing = score([], [])
    assert math.isnan(nothing.exact_match)
    assert math.isnan(nothing.bleu)
    assert nothing.to_json() == {
        "exact_match": None,
        "rouge1": None,
        "rouge2": None,
        "rougeL": None,
        "bleu": None,
        "bleu_tokenize": "13a",
    }


def test_json_of_a_row() -> None:
    (row,) = score(["the cat sat down"], ["the cat sat down"]).rows
    assert row.to_json() == {"exact_match": True, "rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0, "bleu": 100.0}


def test_as_many_predictions_as_references() -> None:
    with pytest.raises(ValueError, match="1 predictions for 2 references"):
        score(["a"], ["a", "b"])
