"""Prompts -> answers of a model -> rewards: what rollouts and evaluations of objectives with rewards have in common.

Shapes: P prompts, G answers to each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from tunedock.data.conversation import Prompt
from tunedock.data.layout import Ints
from tunedock.data.sample import Sample
from tunedock.data.store import SampleStore
from tunedock.errors import EngineError, RewardError, TunedockError
from tunedock.eval.rewards.completion import Completion, Moment, means_of
from tunedock.eval.rewards.scoring import Scorer
from tunedock.model import world
from tunedock.model.answers import Sampled, Sampling

Sums = dict[str, tuple[float, int]]
"""As `eval.rewards.completion.Scores` has them."""

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
        numbers: Sequence[int] | None = ...,
    ) -> list[list[Sampled]]: ...

    @property
    def shared_out(self) -> bool:
        """Whether each rank answers a part of the prompts; else the first answers all."""


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

    @property
    def shared_out(self) -> bool:
        """Whether each rank makes its own part of the answers."""
        return self._answer.shared_out

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
        """Answers to each, their rewards [P, G], and metrics; where several processes train together, on each of them.

        Raises RewardError and EngineError on all of them where one of them met it: they save together what is done.
        """
        if not world.together():
            made, reward_PG, sums = self._judged(asked, None, answers, sampling, seed, between, moment)
            return made, reward_PG, _told(made, reward_PG, sums)
        count = len(asked)
        own = world.own_of(count) if self._answer.shared_out else range(count if world.rank() == 0 else 0)
        part = [asked[i] for i in own]
        numbers = own if self._answer.shared_out else None
        found: tuple[Any, ...] = ([], np.zeros((0, answers)), {})
        failure: TunedockError | None = None
        if part or numbers is not None:
            try:
                found = self._judged(part, numbers, answers, sampling, seed, between, moment)
            except (RewardError, EngineError) as error:
                failure = error
        world.wait_for_all()
        world.raise_together(failure)
        return _of_all(count, answers, own, *found)

    def _judged(
        self,
        asked: Sequence[Asked],
        numbers: Sequence[int] | None,
        answers: int,
        sampling: Sampling,
        seed: int,
        between: Callable[[int], None],
        moment: Moment,
    ) -> tuple[list[list[Sampled]], np.ndarray[Any, np.dtype[np.float64]], Sums]:
        """`numbers`: as `model.answers.Sampler` takes them."""
        prompts = [one.sample.segments[0].tokens_T.tolist() for one in asked]
        made = self._answer(prompts, answers, sampling, seed=seed, between=between, numbers=numbers)
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
        if not completions:
            return [], np.zeros((0, answers)), {}
        scores = self._score(completions, moment)
        reward_PG = np.asarray(scores.total, np.float64).reshape(len(asked), answers)
        cut_PG = np.asarray([[not sampled.stopped for sampled in group] for group in made])
        return made, reward_PG - self._penalty * cut_PG, scores.sums

    def texts(self, group: Sequence[Sampled]) -> list[str]:
        """Without the stop token, which scorers do not expect, and other special ones."""
        texts: list[str] = self._tokenizer.batch_decode([list(one.ids) for one in group], skip_special_tokens=True)
        return texts


def _of_all(
    count: int,
    answers: int,
    own: Sequence[int],
    made: Sequence[Sequence[Sampled]],
    reward_PG: np.ndarray[Any, np.dtype[np.float64]],
    sums: Sums,
) -> tuple[list[list[Sampled]], np.ndarray[Any, np.dtype[np.float64]], Told]:
    """What the ranks have made and scored, in the prompts' order. A collective call."""
    parts = zip(made, reward_PG.tolist(), strict=True)
    told = [[[astuple(one) for one in group], rewards_G] for group, rewards_G in parts]
    whole = world.in_order(count, own, told)
    groups = [[Sampled(tuple(i), s, None if p is None else tuple(p)) for i, s, p in group] for group, _ in whole]
    rewards_PG = np.asarray([rewards_G for _, rewards_G in whole], np.float64).reshape(count, answers)
    of_all: Sums = {}
    for of_one in world.told_by_all(sums):
        for name, (total, scored) in of_one.items():
            before = of_all.get(name, (0.0, 0))
            of_all[name] = (before[0] + total, before[1] + scored)
    return groups, rewards_PG, _told(groups, rewards_PG, of_all)


def _told(
    made: Sequence[Sequence[Sampled]],
    reward_PG: np.ndarray[Any, np.dtype[np.float64]],
    sums: Sums,
) -> Told:
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
    return told | {name: (value, 1.0) for name, value in means_of(sums).items()}
