"""Sources of rewards added up: the sum of weight times value over the sources that have a say, as TRL adds them (`nansum`).

An answer that no source scored has no reward, and a reward of 0 would be a lie: that is an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunedock.errors import RewardError
from tunedock.eval.rewards.completion import SKIPPED, Completion, Log, Moment, Scores, Source, Values
from tunedock.eval.rewards.functions import open_function
from tunedock.eval.rewards.judge import Judge
from tunedock.eval.rewards.model import open_model
from tunedock.recipe.objectives.rewards import AnyReward, FunctionReward, JudgeReward, ModelReward, labels


@dataclass(frozen=True, slots=True)
class Weighted:
    source: Source
    weight: float


class Scorer:
    """Scores completions by all sources. To be closed at the end."""

    def __init__(self, sources: Mapping[str, Weighted]) -> None:
        """`sources`: by the name their metric has."""
        self._sources = dict(sources)

    def __call__(self, completions: Sequence[Completion], moment: Moment | None = None) -> Scores:
        """Raises RewardError for a source that fails or gives what is no score, and for a completion that none of them scored;
        and what `moment.check` raises."""
        log = Log()
        parts = {
            name: _checked(name, weighted.source.values(completions, moment or Moment(), log), completions)
            for name, weighted in self._sources.items()
        }
        weights = [weighted.weight for weighted in self._sources.values()]
        total = [
            _total(completion, weights, [values[n] for values in parts.values()])
            for n, completion in enumerate(completions)
        ]
        # Under a word of their own: a function that logs `loss` must not take the place of the run's.
        sums = {f"logged/{name}": (math.fsum(found), len(found)) for name, found in log.metrics.items()}
        for name, values in parts.items():
            sums |= _sums(name, values)
        return Scores(total, parts, sums, log.extra)

    def lineage(self) -> list[dict[str, Any]]:
        """What the sources are: for the run's record."""
        return [
            {"name": name, "weight": weighted.weight, **weighted.source.lineage()}
            for name, weighted in self._sources.items()
        ]

    def close(self) -> None:
        for weighted in self._sources.values():
            weighted.source.close()


def make_scorer(
    rewards: Sequence[AnyReward], *, hub: str = "hf", offline: bool = False, on_warning: Callable[[str], None] = print
) -> Scorer:
    """Loads functions and reward models. Raises RecipeError, ModelError, RunError or DependencyError for what cannot be loaded.

    `on_warning`: told of what goes on without an error, such as answers that a judge was left out of.
    """

    def opened(reward: AnyReward, name: str) -> Source:
        match reward:
            case FunctionReward():
                return open_function(reward)
            case ModelReward():
                return open_model(reward, hub=hub, offline=offline)
            case JudgeReward():
                return Judge(reward, name, on_warning=on_warning)

    named = zip(labels(rewards), rewards, strict=True)
    return Scorer({name: Weighted(opened(reward, name), reward.weight) for name, reward in named})


def _checked(name: str, values: Values, completions: Sequence[Completion]) -> Values:
    if len(values) != len(completions):
        raise RewardError(f"`{name}` gave {len(values)} scores for {len(completions)} completions")
    for value, completion in zip(values, completions, strict=True):
        if value is not None and not math.isfinite(value):
            raise RewardError(
                f"`{name}` gave the score {value}, which is no finite number",
                where=completion.row_id,
                hint="a function gives None where it has no say",
            )
    return values


def _total(completion: Completion, weights: Sequence[float], values: Sequence[float | None]) -> float:
    found = [weight * value for weight, value in zip(weights, values, strict=True) if value is not None]
    if not found:
        raise RewardError(
            "no source of rewards has a say about an answer to this row",
            where=completion.row_id,
            hint="add one that scores every answer, or take such rows out of the data",
        )
    return math.fsum(found)


def _sums(name: str, values: Values) -> dict[str, tuple[float, int]]:
    found = [value for value in values if value is not None]
    skipped = len(values) - len(found)
    return {
        f"rewards/{name}": (math.fsum(found), len(found)),
        f"rewards/{name}{SKIPPED}": (float(skipped), len(values)),
    }
