"""Replies of an engine: what vLLM sends is taken as it is, anything else is refused and never crashes the reader."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunedock.model.answers import Sampled
from tunedock.model.engine.replies import Expected, NotAnAnswer, read

STOP, OTHER_STOP = 9, 8


def words(text: str) -> Sequence[int]:
    return [int(word) for word in text.split()]


ONE = Expected((1, 2, 3), 1, 4, {STOP, OTHER_STOP}, STOP, 100, words)


def choice(**fields: Any) -> dict[str, Any]:
    return {"index": 0, "text": "5 6", "finish_reason": "length", "logprobs": None, **fields}


def one(**fields: Any) -> tuple[Sampled, int]:
    (made,), guessed = read({"choices": [choice(**fields)]}, ONE)
    return made, guessed


def test_token_ids_are_taken() -> None:
    assert one(token_ids=[5, 6]) == (Sampled((5, 6), False), 0)
    logprobs = {"tokens": ["token_id:5", "token_id:6"], "token_logprobs": [-1.5, -2]}
    assert one(logprobs=logprobs) == (Sampled((5, 6), False, (-1.5, -2.0)), 0)
    assert one(token_ids=[5, 6], logprobs=logprobs)[0].logprobs == (-1.5, -2.0)


def test_an_answer_that_stopped_ends_with_a_stop_token() -> None:
    assert one(token_ids=[5, STOP], finish_reason="stop")[0] == Sampled((5, STOP), True)
    assert one(token_ids=[5], finish_reason="stop")[0] == Sampled((5, STOP), True)
    assert one(token_ids=[5], finish_reason="stop", stop_reason=OTHER_STOP)[0] == Sampled((5, OTHER_STOP), True)
    assert one(token_ids=[5], finish_reason="stop", stop_reason="###")[0] == Sampled((5, STOP), True)
    assert one(token_ids=[], finish_reason="stop")[0] == Sampled((STOP,), True)


def test_what_follows_a_stop_token_is_cut_off_with_its_logprobs() -> None:
    made = one(token_ids=[5, STOP, 6, 7], logprobs={"token_logprobs": [-1.0, -2.0, -3.0, -4.0]})[0]
    assert made == Sampled((5, STOP), True, (-1.0, -2.0))


def test_text_alone_is_a_guess() -> None:
    assert one(logprobs={"tokens": ["a", "b"], "token_logprobs": [-1.0, -2.0]}) == (Sampled((5, 6), False), 1)
    assert one(finish_reason="stop") == (Sampled((5, 6, STOP), True), 1)


def test_answers_are_put_in_order() -> None:
    choices = [choice(index=n, token_ids=[n + 10]) for n in (2, 0, 1)]
    made, _ = read({"choices": choices}, replace(ONE, answers=3))
    assert [answer.ids for answer in made] == [(10,), (11,), (12,)]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"token_ids": [5, "6"]}, "no whole numbers"),
        ({"token_ids": [True]}, "no whole numbers"),
        ({"token_ids": "56"}, "no whole numbers"),
        ({"token_ids": [100]}, "none of the model's 100"),
        ({"token_ids": [-1]}, "none of the model's 100"),
        ({"token_ids": [5] * 5}, "5 tokens, more than the 4"),
        ({"token_ids": []}, "no token"),
        ({"finish_reason": None, "token_ids": [5]}, "ended by `None`"),
        ({"finish_reason": "tool_calls", "token_ids": [5]}, "ended by `tool_calls`"),
        ({"text": None}, "neither token ids nor text"),
        ({"token_ids": [5], "prompt_token_ids": [2, 3]}, "answers another prompt"),
    ],
)
def test_what_makes_no_sense_is_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(NotAnAnswer, match=reason):
        one(**fields)


@pytest.mark.parametrize("reply", [None, [], "x", {}, {"choices": {}}, {"choices": ["x"]}, {"choices": []}])
def test_other_replies_are_refused(reply: Any) -> None:
    with pytest.raises(NotAnAnswer):
        read(reply, ONE)
    with pytest.raises(NotAnAnswer, match="not numbered"):
        read({"choices": [choice(), choice()]}, replace(ONE, answers=2))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("token_id:5"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=3,
)
CHOICE = st.fixed_dictionaries(
    {},
    optional={
        "index": st.just(0) | JSON,
        "text": st.just("5 6") | JSON,
        "finish_reason": st.sampled_from(["stop", "length"]) | JSON,
        "stop_reason": JSON,
        "token_ids": st.lists(st.integers(-1, 101), max_size=6) | JSON,
        "prompt_token_ids": st.just([1, 2, 3]) | JSON,
        "logprobs": st.fixed_dictionaries({}, optional={"tokens": JSON, "token_logprobs": JSON}) | JSON,
    },
)


@settings(max_examples=60)
@given(st.lists(CHOICE, max_size=2), st.integers(1, 2))
def test_whatever_comes_is_an_answer_or_refused(choices: list[dict[str, Any]], answers: int) -> None:
    def tokens(text: str) -> Sequence[int]:
        return [ord(letter) % 100 for letter in text]

    try:
        made, guessed = read({"choices": choices}, replace(ONE, answers=answers, tokens_of=tokens))
    except NotAnAnswer:
        return
    assert len(made) == answers and 0 <= guessed <= answers
    for answer in made:
        assert answer.ids and all(type(token) is int and 0 <= token < 100 for token in answer.ids)
        assert answer.logprobs is None or len(answer.logprobs) <= len(answer.ids)
        stops = [token in ONE.stop_ids for token in answer.ids]
        assert not any(stops[:-1]) and stops[-1] == answer.stopped
