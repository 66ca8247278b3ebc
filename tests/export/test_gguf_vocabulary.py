"""A tokenizer as llama.cpp is told of it, and tokenizers that it cannot be told of."""

from __future__ import annotations

import copy
from collections.abc import Callable

import gguf
import pytest
from small_models import words
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import families
from tunedock.errors import ModelError
from tunedock.export.gguf.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, vocabulary_of

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def changed(family: str, change: Callable[[Tokenizer], None]) -> PreTrainedTokenizerFast:
    made = copy.deepcopy(families.tokenizer(family))
    change(made.backend_tokenizer)
    return made


def cut(*steps: pre_tokenizers.PreTokenizer) -> Callable[[Tokenizer], None]:
    def change(tokenizer: Tokenizer) -> None:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps))

    return change


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def test_a_byte_level_vocabulary() -> None:
    tokenizer = families.tokenizer("qwen3")
    ends = sorted(families.stop_ids("qwen3"))
    found = vocabulary_of(tokenizer, len(tokenizer) + 5, ends)
    assert (found.model, found.pre, found.scores, found.add_bos) == ("gpt2", "llama-bpe", None, False)
    assert found.tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    assert found.tokens[-1] == f"[PAD{len(tokenizer) + 4}]"
    kinds = {text: gguf.TokenType(kind) for text, kind in zip(found.tokens, found.types, strict=True)}
    assert (kinds["<|im_end|>"], kinds["<think>"], kinds["a"]) == (CONTROL, USER_DEFINED, NORMAL)
    assert kinds[found.tokens[-1]] is UNUSED
    assert found.merges is not None and " " in found.merges[0]
    assert found.ids["eos"] == tokenizer.eos_token_id
    assert {found.ids["eos"], found.ids["eot"]} == set(ends)
    assert found.chat_template == tokenizer.chat_template


def test_a_vocabulary_of_sentencepieces_kind() -> None:
    tokenizer = words("gemma")
    found = vocabulary_of(tokenizer, len(tokenizer), [1])
    assert (found.model, found.pre, found.merges, found.add_space_prefix) == ("llama", "default", None, False)
    assert (found.add_bos, found.add_eos) == (True, False)
    kinds = {text: gguf.TokenType(kind) for text, kind in zip(found.tokens, found.types, strict=True)}
    assert (kinds["<0x0A>"], kinds["<bos>"], kinds["<unk>"]) == (BYTE, CONTROL, UNKNOWN)
    assert vocabulary_of(words("mistral"), len(words("mistral")), [1]).add_space_prefix is True
    assert found.scores is not None
    made = [score for score, kind in zip(found.scores, found.types, strict=True) if kind == NORMAL]
    assert len(set(made)) > 100 and max(made) <= 0


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (cut(pre_tokenizers.Split(Regex(QWEN), "isolated"), BYTES), "qwen2"),
        (cut(pre_tokenizers.Split(families.GPT_SPLIT, "isolated"), BYTES), "llama-bpe"),
        (cut(pre_tokenizers.ByteLevel(add_prefix_space=False)), "gpt-2"),
        (cut(pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)), "smollm"),
    ],
)
def test_expressions_by_name(change: Callable[[Tokenizer], None], name: str) -> None:
    tokenizer = changed("qwen3", change)
    assert vocabulary_of(tokenizer, len(tokenizer), [0]).pre == name


def lowercase(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Lowercase()


def unigram(tokenizer: Tokenizer) -> None:
    tokenizer.model = models.Unigram([("a", -1.0)])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (cut(pre_tokenizers.Split(Regex(r"\p{L}+"), "isolated"), BYTES), "for which llama.cpp has no name"),
        (
            cut(pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)),
            "cuts texts by Punctuation",
        ),
        (cut(pre_tokenizers.Whitespace()), "neither a byte-level tokenizer nor"),
        (lowercase, "normalises texts by Lowercase"),
        (unigram, "the tokenizer's model is `Unigram`"),
    ],
)
def test_what_llama_cpp_cannot_be_told_is_refused(change: Callable[[Tokenizer], None], says: str) -> None:
    tokenizer = changed("qwen3", change)
    with pytest.raises(ModelError) as caught:
        vocabulary_of(tokenizer, 2000, [0])
    assert says in str(caught.value)


def test_an_embedding_that_is_too_small() -> None:
    tokenizer = families.tokenizer("qwen3")
    with pytest.raises(ModelError, match="has no row in the embedding"):
        vocabulary_of(tokenizer, len(tokenizer) - 1, [0])


def test_texts_that_are_normalised_are_noted() -> None:
    tokenizer = families.tokenizer("qwen3")
    assert "NFC" in vocabulary_of(tokenizer, len(tokenizer), [0]).notes[0]
