"""Words looked up give the tokens of the whole text."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE

from families import tokenizer
from tunedock.data import words as module
from tunedock.data.words import Words

KINDS = "aZé你7٣._/-'👍\u0301\u200d$\\(\" \n\t\r\u00a0\u3000\x1c\u2028\x85"
TEXTS = st.lists(
    st.sampled_from([*KINDS, "  ", "\n\n", "'s", "'LL", "don't", "12345", " the", "\r\n"]), max_size=30
).map("".join)


def ids_of(words: Words, text: str) -> list[int]:
    ((spelling, ids),) = words.spell([text])
    assert "".join(spelling) == text
    return np.frombuffer(b"".join(ids), np.int32).tolist()


@pytest.mark.parametrize("family", ["qwen3", "llama3", "deepseek-v3", "cohere2", "glm4-moe"])
def test_words_are_the_whole(family: str) -> None:
    backend = tokenizer(family).backend_tokenizer
    words = Words.of(backend)
    assert words is not None

    @settings(deadline=None, max_examples=300)
    @given(TEXTS | st.text(max_size=40))
    def check(text: str) -> None:
        assert ids_of(words, text) == backend.encode(text, add_special_tokens=False).ids

    check()


@settings(deadline=None, max_examples=500)
@given(TEXTS)
def test_the_patterns_split_where_they_say(text: str) -> None:
    assert re.findall(module._AT_SPACES, text) == [part for part in re.split(r"(?<=\S)(?= )", text) if part]
    assert re.findall(module._AT_LINES, text) == [
        part for part in re.split(r"(?<=\S)(?= )|(?<=\n)(?=\w)", text) if part
    ]


def gpt2(**options: bool) -> Tokenizer:
    made = Tokenizer(BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(**options)
    return made


def test_a_pattern_that_looks_across_lines_is_split_at_spaces_only() -> None:
    words = Words.of(gpt2(add_prefix_space=False))  # of "a\n\nb" it makes "\n" twice, of "a\n\n" one word
    assert words is not None
    assert words._pattern.pattern == module._AT_SPACES


@pytest.mark.parametrize("family", ["gemma", "phi3", "mistral"])
def test_tokenizers_that_merge_across_spaces_have_no_words(family: str) -> None:
    assert Words.of(tokenizer(family).backend_tokenizer) is None


def test_what_depends_on_the_rest_of_the_text_has_no_words() -> None:
    lowered = gpt2(add_prefix_space=False)
    lowered.normalizer = normalizers.Strip()
    dropping = gpt2(add_prefix_space=False)
    dropping.model = BPE(dropout=0.1)
    pairs = Tokenizer(BPE())
    pairs.pre_tokenizer = pre_tokenizers.Split("a b", "isolated")
    assert [Words.of(one) for one in (lowered, dropping, pairs)] == [None] * 3


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_CHARACTERS", 100)
    backend = tokenizer("qwen3").backend_tokenizer
    words = Words.of(backend)
    assert words is not None
    for number in range(50):
        text = f"word{number} and others{number}"
        assert ids_of(words, text) == backend.encode(text, add_special_tokens=False).ids
        assert sum(map(len, words._known)) < 100 + len(text)


def test_hostile_whitespace_takes_no_longer() -> None:
    """Time is linear: a million blanks, and a million words without one."""
    words = Words.of(tokenizer("qwen3").backend_tokenizer)
    assert words is not None
    for text in (" " * 10**6, "\n \t" * 300_000, "a\n" * 300_000, "\n" * 10**6 + "_"):
        assert "".join(words._pattern.findall(text)) == text
