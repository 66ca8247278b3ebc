"""Optuna's part of a search: a study in SQLite, its sampler and its pruner.

A trial's sampler is seeded by the recipe's seed and the trial's number, and knows the trials before it: a search that was killed
and gone on with asks for the same trials as one that was not.
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunedock.errors import DependencyError, RunError
from tunedock.recipe.search import Dimension, Search

if TYPE_CHECKING:
    import optuna

NAME = "search"


def require_optuna() -> None:
    try:
        import optuna
    except ImportError:
        raise DependencyError(
            "a search needs the package optuna, which is not installed", hint="`pip install 'tunedock[search]'`"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)


class Study:
    """The study of a search directory."""

    def __init__(self, folder: Path, search: Search) -> None:
        """Opens or makes `study.db`. Raises DependencyError without optuna, RunError for a file that is no study."""
        require_optuna()
        import optuna
        from sqlalchemy.exc import SQLAlchemyError

        self._search = search
        try:
            self.study = optuna.create_study(
                storage=f"sqlite:///{folder / 'study.db'}",
                study_name=NAME,
                direction=search.direction,
                pruner=_pruner(search),
                load_if_exists=True,
            )
        except (SQLAlchemyError, RuntimeError, optuna.exceptions.OptunaError) as error:
            raise RunError(
                f"the study cannot be opened: {type(error).__name__}",
                where=str(folder / "study.db"),
                hint="the file is damaged or of another version of Optuna; start a new search",
            ) from None

    @property
    def limit(self) -> int:
        """Trials in all; a grid has an end of its own."""
        if self._search.sampler != "grid":
            return self._search.trials
        return min(self._search.trials, math.prod(len(_labels(d)) for d in self._search.space.values()))

    def _combination(self, number: int) -> dict[str, Any]:
        """Of a grid, in the order of the recipe, the last key's values changing first."""
        combinations = itertools.product(*(_labels(dimension) for dimension in self._search.space.values()))
        return dict(zip(self._search.space, next(itertools.islice(combinations, number, None)), strict=True))

    def begun(self) -> list[optuna.trial.FrozenTrial]:
        import optuna

        waiting = optuna.trial.TrialState.WAITING
        return [trial for trial in self.study.get_trials(deepcopy=False) if trial.state != waiting]

    def unfinished(self) -> list[optuna.Trial]:
        """Trials that a kill left in the middle."""
        import optuna

        found = []
        for frozen in self.begun():
            if frozen.state == optuna.trial.TrialState.RUNNING:
                self.study.sampler = self._sampler(frozen.number)
                found.append(optuna.Trial(self.study, frozen._trial_id))
        return found

    def next(self) -> optuna.Trial:
        number = len(self.begun())
        self.study.sampler = self._sampler(number)
        if self._search.sampler == "grid" and len(self.study.get_trials(deepcopy=False)) == number:
            self.study.enqueue_trial(self._combination(number))
        return self.study.ask()

    def values(self, trial: optuna.Trial) -> dict[str, Any]:
        """The trial's value of each key; asked for again, the same."""
        return {key: _suggest(trial, key, dimension) for key, dimension in self._search.space.items()}

    def tell(self, trial: optuna.Trial, value: float | None, state: str) -> None:
        """`state`: complete, pruned or fail."""
        import optuna

        states = optuna.trial.TrialState
        told = {"complete": states.COMPLETE, "pruned": states.PRUNED, "fail": states.FAIL}[state]
        self.study.tell(trial, value if state == "complete" else None, state=told)

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        import optuna

        seed = (self._search.seed + number) % 2**32
        if self._search.sampler == "tpe":
            return optuna.samplers.TPESampler(seed=seed)
        return optuna.samplers.RandomSampler(seed=seed)


def _pruner(search: Search) -> optuna.pruners.BasePruner:
    import optuna

    if search.pruner == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=3)
    if search.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner()
    return optuna.pruners.NopPruner()


def _labels(dimension: Dimension) -> list[Any]:
    """What Optuna knows the values by: JSON text for choices, for they may be lists."""
    if dimension.choice is not None:
        return [json.dumps(value) for value in dimension.choice]
    return list(range(int(dimension.low), int(dimension.high) + 1))


def _suggest(trial: optuna.Trial, key: str, dimension: Dimension) -> Any:
    if dimension.choice is not None:
        return json.loads(trial.suggest_categorical(key, _labels(dimension)))
    if dimension.int_uniform is not None:
        return trial.suggest_int(key, int(dimension.low), int(dimension.high))
    return trial.suggest_float(key, dimension.low, dimension.high, log=dimension.log_uniform is not None)
