"""What an example means is the same after a trip through JSON, and its trainable answers are found in every kind."""

from __future__ import annotations

import json

import pytest

from tunedock.data.conversation import (
    Conversation,
    Document,
    Example,
    Labelled,
    Message,
    Preference,
    Prompt,
    Verdicts,
    answers,
    from_json,
    to_json,
)

ASK, THINK, SAY = Message("user", "?"), Message("assistant", "!", reasoning="hm"), Message("assistant", "-")
EXAMPLES: list[tuple[Example, list[Message]]] = [
    (Conversation((ASK, SAY, ASK, THINK)), [SAY, THINK]),
    (Preference((ASK, SAY, ASK), (THINK,), (SAY,)), [THINK, SAY]),
    (Verdicts((ASK, SAY, ASK), (THINK,), (SAY,)), [THINK, SAY]),
    (Labelled((ASK,), (SAY, ASK, THINK), label=False), [SAY, THINK]),
    (Document("text"), []),
    (Prompt((ASK,), None, {"level": 3}), []),
]


@pytest.mark.parametrize(("example", "expected"), EXAMPLES, ids=lambda value: type(value).__name__)
def test_answers(example: Example, expected: list[Message]) -> None:
    """Those of a prompt are context: whether serving prompts ask for reasoning is decided by what is trained."""
    assert answers(example) == expected


@pytest.mark.parametrize("example", [example for example, _ in EXAMPLES], ids=lambda value: type(value).__name__)
def test_there_and_back(example: Example) -> None:
    assert from_json(json.loads(json.dumps(to_json(example)))) == example
