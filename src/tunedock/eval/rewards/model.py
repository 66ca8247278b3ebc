"""A reward model as a source: the score it gives to prompt and answer, rendered by its own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from tunedock.data.conversation import Conversation, Message, RowRefused
from tunedock.data.turns import split_thinking
from tunedock.errors import ModelError
from tunedock.eval.rewards.completion import Completion, Log, Moment, Values
from tunedock.model.scorer import load_scorer
from tunedock.recipe.objectives.rewards import ModelReward

TOGETHER = 64
"""Conversations asked about between two looks at whether to stop."""


class ConversationScorer(Protocol):
    """What is asked of a reward model (`model.scorer.Scorer`)."""

    def scores(self, conversations: Sequence[Conversation]) -> list[float]: ...


class ModelSource:
    def __init__(self, scorer: ConversationScorer, identity: dict[str, Any]) -> None:
        self._scorer = scorer
        self._identity = identity

    def values(self, completions: Sequence[Completion], moment: Moment, log: Log) -> Values:
        values: Values = []
        for start in range(0, len(completions), TOGETHER):
            moment.check()
            values += self._scorer.scores([conversation(one) for one in completions[start : start + TOGETHER]])
        return values

    def lineage(self) -> dict[str, Any]:
        return {"kind": "model", **self._identity}

    def close(self) -> None:
        """There is nothing to let go of."""


def conversation(completion: Completion) -> Conversation:
    """Prompt and answer, reasoning apart where there is any."""
    try:
        reasoning, content = split_thinking(completion.text, "completion")
    except RowRefused:  # thinking that was cut off is all there is to be judged
        reasoning, content = None, completion.text
    return Conversation((*completion.prompt, Message("assistant", content, reasoning=reasoning)), completion.tools)


def open_model(reward: ModelReward, *, hub: str, offline: bool) -> ModelSource:
    """Raises what `model.scorer.load_scorer` raises."""
    try:
        scorer = load_scorer(
            reward.path,
            revision=reward.revision,
            hub=hub,
            offline=offline,
            trust_remote_code=reward.trust_remote_code,
        )
    except ModelError as error:
        if (error.where or "").startswith("model: "):  # as it is looked up, every model is the recipe's `model`
            raise ModelError(error.message, where=f"objective.rewards: {reward.path}", hint=error.hint) from None
        raise
    return ModelSource(scorer, {"path": reward.path, "revision": reward.revision})
