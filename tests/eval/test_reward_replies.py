"""A judge's reply is read strictly."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunedock.eval.rewards.parse import NoScore, score_of
from tunedock.recipe.objectives.rewards import JudgeReward

JSON = JudgeReward(base_url="http://h/v1", model="m")
REGEX = JudgeReward(base_url="http://h/v1", model="m", parse="regex", scale=[1.0, 5.0])


def reply(content, reason="stop"):
    return SimpleNamespace(choices=[SimpleNamespace(message=SimpleNamespace(content=content), finish_reason=reason)])


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ('{"score": 7}', 0.7),
        ('{"score": 10, "why": "good"}', 1.0),
        (' \n{"score": 0}\n', 0.0),
        ('```json\n{"score": 2.5}\n```', 0.25),
        ('Here it is:\n```\n{"score": 5}\n```\nAs asked.', 0.5),
        ('<think>\nIt says {"score": 10}.\n</think>\n\n{"score": 1}', 0.1),
    ],
)
def test_json(text, score):
    assert score_of(reply(text), JSON) == pytest.approx(score)


@pytest.mark.parametrize(
    "text",
    [
        '{"score": 7} {"score": 9}',
        '{"score": 7, "score": 9}',
        '{"score": "7"}',
        '{"score": true}',
        '{"score": null}',
        '{"score": 1e999}',
        '{"score": Infinity}',
        '{"score": -1}',
        '{"Score": 7}',
        "[7]",
        "7",
        'The answer says {"score": 10}',
        '```json\n{"score": 2}\n```\n```json\n{"score": 3}\n```',
        "<think> never ends",
        "[" * 5000,
        '{"score": ' + "9" * 5000 + "}",
        " " * 70000 + '{"score": 1}',
        "",
        None,
        3,
    ],
)
def test_what_is_not_of_the_form_is_no_score(text):
    with pytest.raises(NoScore):
        score_of(reply(text), JSON)


@pytest.mark.parametrize("nothing", [None, "text", {}, SimpleNamespace(choices=[]), SimpleNamespace(choices=[None])])
def test_what_is_no_chat_completion_is_no_score(nothing):
    with pytest.raises(NoScore):
        score_of(nothing, JSON)


def test_a_pattern():
    assert score_of(reply("Fine.\nScore: 4"), REGEX) == 0.75
    assert score_of(reply("Score: 4\nSo, as said, score: 4"), REGEX) == 0.75
    for text in ("Score: 4\nScore: 5", "4", "Score: four", "Score: 6"):
        with pytest.raises(NoScore):
            score_of(reply(text), REGEX)
    with pytest.raises(NoScore, match="cut off"):
        score_of(reply("Score: 4", "length"), REGEX)
    optional = REGEX.model_copy(update={"pattern": r"Score:( \d)?"})
    with pytest.raises(NoScore, match="no number"):
        score_of(reply("Score:"), optional)


@given(
    st.text() | st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda x: st.lists(x)).map(json.dumps)
)
def test_any_text_is_a_score_between_0_and_1_or_none(text):
    for section in (JSON, REGEX):
        try:
            assert 0.0 <= score_of(reply(text), section) <= 1.0
        except NoScore as none:
            assert str(none)


@given(st.floats(0, 10))
def test_every_score_of_the_scale_is_read(value):
    assert score_of(reply(json.dumps({"score": value})), JSON) == pytest.approx(value / 10)
