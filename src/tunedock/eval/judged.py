"""Prompts -> answers of a model -> rewards: what rollouts and evaluations of objectives with rewards have in common.

Shapes: P prompts, G answers to each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from tunedock.data.conversation import Prompt
from tunedock.data.layout import Ints
from tunedock.data.sample import Sample
from tunedock.data.store import SampleStore
from tunedock.eval.rewards.completion import Completion, Moment, Scores
from tunedock.eval.rewards.scoring import Scorer
from tunedock.model.answers import Sampled, Sampling

Told = dict[str, tuple[float, float]]
"""Metrics: name -> (sum, what it is divided by)."""


class Answerer(Protocol):
    """What makes answers (`model.answers.Sampler`)."""

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        answers: int,
        sampling: Sampling,
        *,
        seed: int,
        between: Callable[[int], None] = ...,
    ) -> list[list[Sampled]]: ...


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt of the data."""

    sample: Sample
    example: Prompt


class Prompts:
    """The prompts of one side of the data."""

    def __init__(self, store: SampleStore) -> None:
        self.store = store

    def __len__(self) -> int:
        return len(self.store)

    def take(self, indices: Sequence[int] | Ints) -> list[Asked]:
        found = [self.store.stored(int(i)) for i in indices]
        return [Asked(one.sample, one.example) for one in found if isinstance(one.example, Prompt)]


class Judged:
    """Makes answers and has them scored."""

    def __init__(self, answer: Answerer, score: Scorer, tokenizer: PreTrainedTokenizerBase, penalty: float) -> None:
        """`penalty`: what an answer that was cut off costs."""
        self._answer = answer
        self._score = score
        self._tokenizer = tokenizer
        self._penalty = penalty

    def __call__(
        self,
        asked: Sequence[Asked],
        answers: int,
        sampling: Sampling,
        *,
        seed: int,
        between: Callable[[int], None],
        moment: Moment,
    ) -> tuple[list[list[Sampled]], np.ndarray[Any, np.dtype[np.float64]], Told]:
        """Answers to each, their rewards [P, G], and metrics."""
        prompts = [one.sample.segments[0].tokens_T.tolist() for one in asked]
        made = self._answer(prompts, answers, sampling, seed=seed, between=between)
        texts = [self.texts(group) for group in made]
        completions = [
            Completion(
                one.sample.row_id,
                one.example.prompt,
                text,
                sampled.ids,
                one.example.tools,
                one.example.columns,
                one.example.answer,
            )
            for one, group, said in zip(asked, made, texts, strict=True)
            for sampled, text in zip(group, said, strict=True)
        ]
        scores = self._score(completions, moment)
        reward_PG = np.asarray(scores.total, np.float64).reshape(len(asked), answers)
        cut_PG = np.asarray([[not sampled.stopped for sampled in group] for group in made])
        reward_PG = reward_PG - self._penalty * cut_PG
        return made, reward_PG, _told(made, reward_PG, scores)

    def texts(self, group: Sequence[Sampled]) -> list[str]:
        """Without the stop token, which scorers do not expect, and other special ones."""
        texts: list[str] = self._tokenizer.batch_decode([list(one.ids) for one in group], skip_special_tokens=True)
        return texts


def _told(made: Sequence[Sequence[Sampled]], reward_PG: np.ndarray[Any, np.dtype[np.float64]], scores: Scores) -> Told:
    """Metrics by TRL's names."""
    flat = [sampled for group in made for sampled in group]
    count = float(len(flat))
    told: Told = {
        "reward": (float(reward_PG.sum()), count),
        "reward_std": (float(reward_PG.std(ddof=1)) if reward_PG.size > 1 else 0.0, 1.0),
        "completions/mean_length": (float(sum(len(one.ids) for one in flat)), count),
        "completions/clipped_ratio": (float(sum(not one.stopped for one in flat)), count),
    }
    if reward_PG.shape[1] > 1:
        same = (reward_PG.max(axis=1) - reward_PG.min(axis=1)) < 1e-12
        told["frac_reward_zero_std"] = (float(same.sum()), float(len(reward_PG)))
    return told | {name: (value, 1.0) for name, value in scores.metrics.items()}
