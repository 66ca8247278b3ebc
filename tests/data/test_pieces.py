"""Text cut at its added tokens gives the tokens of the whole text, at the same places."""

from __future__ import annotations

import random

import pytest

from families import FAMILIES, tokenizer
from tunedock.data.pieces import Pieces

WORDS = [
    "hello",
    " the user",
    "\n",
    "\n\n",
    "  ",
    " ",
    "你好，请问",
    "24",
    "'s",
    "def add(a, b):",
    "\t",
    "é",
    "👍",
    "e\u0301",
    "<",
    "|",
]


def text_of(draw: random.Random, added: list[str]) -> str:
    return "".join(draw.choice(added if draw.random() < 0.3 else WORDS) for _ in range(draw.randint(0, 30)))


@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_are_the_whole(family: str) -> None:
    words = tokenizer(family)
    draw = random.Random(family)
    texts = [text_of(draw, [token.content for token in words.added_tokens_decoder.values()]) for _ in range(120)]
    pieces = Pieces(words)
    for text, found in zip(texts, pieces.encode(texts), strict=True):
        whole = words(text, add_special_tokens=False, return_offsets_mapping=True)
        assert found.ids_T.tolist() == whole["input_ids"]
        offsets = whole["offset_mapping"]
        assert [found.offset(i) for i in range(len(found))] == offsets
        for place in range(len(text) + 1):
            assert found.at(place) == sum(end <= place for _, end in offsets)
    assert pieces._cuts is not None or not any(not t.rstrip for t in words.added_tokens_decoder.values())


def test_a_piece_in_many_texts_is_tokenised_once() -> None:
    words = tokenizer("qwen3")
    pieces = Pieces(words)
    asked: list[int] = []
    plain = pieces._encoded
    pieces._encoded = lambda texts: asked.append(len(texts)) or plain(texts)  # type: ignore[method-assign,func-returns-value]
    pieces._unproven = 0
    pieces._may_have_words = False
    pieces.encode([f"<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n{n}<|im_end|>\n" for n in range(50)])
    assert asked == [2 + 50]


def test_padding_others_asked_for_does_not_stay() -> None:
    words = tokenizer("qwen3")
    words(["a", "a longer text"], padding=True, truncation=True, max_length=2)
    found = Pieces(words).encode(["<|im_start|>user\nhow many hours", "a"])
    assert [one.ids_T.tolist() for one in found] == [
        words(text, add_special_tokens=False)["input_ids"] for text in ("<|im_start|>user\nhow many hours", "a")
    ]
