from __future__ import annotations

import time
import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from tunedock.eval.difference import Part, compare

TEXTS = st.text(alphabet=st.sampled_from("ab 的了。\n,é") | st.characters(), max_size=60)


def test_words_and_characters() -> None:
    assert compare("the dog sat", "the cat sat") == [
        Part("same", "the"),
        Part("missing", " cat"),
        Part("extra", " dog"),
        Part("same", " sat"),
    ]
    assert compare("三个工作日", "两个工作日") == [Part("missing", "两"), Part("extra", "三"), Part("same", "个工作日")]


@given(TEXTS, TEXTS)
def test_parts_make_up_both_texts(answer: str, reference: str) -> None:
    parts = compare(answer, reference)
    assert parts is not None
    assert "".join(part.text for part in parts if part.kind != "missing") == unicodedata.normalize("NFC", answer)
    theirs = "".join(part.text for part in parts if part.kind != "extra")
    assert "".join(theirs.split()) == "".join(unicodedata.normalize("NFC", reference).split())


def test_white_space_and_spelling_make_no_difference() -> None:
    assert compare("a  b\n", "a b") == [Part("same", "a  b\n")]
    assert compare(unicodedata.normalize("NFD", "café"), "café") == [Part("same", "café")]
    assert compare("", "") == []


def test_a_model_that_repeats_itself_is_not_waited_for() -> None:
    started = time.perf_counter()
    assert compare("的了" * 1500, "了的的" * 1000) is None  # difflib alone: 88 s
    assert compare("的 " * 20_000, "一句话。") is None
    assert time.perf_counter() - started < 5
    assert compare("很" * 2900, "天气很好") is not None
