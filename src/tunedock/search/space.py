"""The search space against the recipe: every value is checked before the first trial begins."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tunedock.errors import RecipeError
from tunedock.plan.cards import gpus_here
from tunedock.recipe.load import load
from tunedock.recipe.resolve import Resolved, resolve
from tunedock.recipe.schema import Recipe
from tunedock.recipe.search import Dimension, Search

FIXED: Mapping[str, str] = {
    "search": "a search does not search itself",
    "train.output_dir": "each trial has a directory of its own",
    "data.validation": "trials are compared on the same validation rows",
    "data.split": "trials are compared on the same validation rows",
    "data.test": "a search never looks at the test rows",
    "train.eval_strategy": "trials are compared at the same evaluations",
    "objective.kind": "losses of different objectives cannot be compared",
    "launch": "it does not change what is trained",
    "track": "it does not change what is trained",
    "eval": "it does not change what is trained",
}
"""Keys that a space may not name, and why."""


def base_recipe(files: Sequence[Path], overrides: Sequence[str]) -> tuple[Resolved, Search]:
    """The recipe as it stands and its `search` section. Raises RecipeError where there is none, or nothing to compare by."""
    resolved = resolve(load(files, overrides), gpus=gpus_here)
    search = resolved.recipe.search
    if search is None:
        raise RecipeError(
            "the recipe has no `search` section",
            where=str(files[-1]) if files else "recipe",
            hint="add one: `search: {trials: 20, space: {train.learning_rate: {log_uniform: [1.0e-5, 1.0e-3]}}}`",
        )
    if resolved.recipe.launch.nodes > 1:
        raise RecipeError(
            "a search starts many runs, and a machine joins one",
            where="launch.nodes",
            hint="search on one machine: `launch.nodes=1`",
        )
    if resolved.recipe.train.eval_strategy == "no":
        raise RecipeError(
            "trials are compared by the validation rows, and there is no evaluation",
            where="train.eval_strategy",
            hint="give `data.split.validation` a share or files in `data.validation`, and leave `train.eval_strategy` out",
        )
    return resolved, search


def trial_recipe(
    files: Sequence[Path], overrides: Sequence[str], values: Mapping[str, Any], output_dir: Path | None = None
) -> Resolved:
    """The recipe of one trial, what is derived from its values derived anew. Raises RecipeError."""
    given = [*overrides, *(f"{key}={_yaml(value)}" for key, value in values.items())]
    if output_dir is not None:
        given.append(f"train.output_dir={json.dumps(str(output_dir))}")
    resolved = resolve(load(files, given), gpus=gpus_here)
    origins = {key: origin for key, origin in resolved.origins.items() if not key.startswith("search")}
    return replace(resolved, recipe=resolved.recipe.model_copy(update={"search": None}), origins=origins)


def check_space(files: Sequence[Path], overrides: Sequence[str], search: Search) -> None:
    """Resolves the recipe with each choice and each end of a range. Raises RecipeError naming the first that cannot be."""
    for key, dimension in search.space.items():
        where = f"search.space.{key}"
        for fixed, why in FIXED.items():
            if key == fixed or key.startswith(f"{fixed}."):
                raise RecipeError(f"`{key}` is not searched: {why}", where=where, hint="take it out of `search.space`")
        if key.split(".")[0] not in Recipe.model_fields:
            raise RecipeError(
                f"the recipe has no key `{key}`",
                where=where,
                hint="write it dotted: `train.learning_rate`, `adapter.r`",
            )
        if search.sampler == "grid" and dimension.form in ("uniform", "log_uniform"):
            raise RecipeError(
                f"`sampler: grid` takes every combination, and `{dimension.form}` has endlessly many values",
                where=where,
                hint="give `choice`, or `sampler: tpe`",
            )
        for value in _ends(dimension):
            try:
                trial_recipe(files, overrides, {key: value})
            except RecipeError as error:
                raise RecipeError(f"with `{key}: {value}`: {error.message}", where=where, hint=error.hint) from None


def _ends(dimension: Dimension) -> Iterator[Any]:
    if dimension.choice is not None:
        yield from dimension.choice
    elif dimension.int_uniform is not None:
        yield from dimension.int_uniform
    else:
        yield from (dimension.low, dimension.high)


def _yaml(value: Any) -> str:
    """JSON, in which a float keeps its point: `1e-05` is text to some readers of YAML."""
    if isinstance(value, float):
        digits, exponent, power = repr(value).partition("e")
        return f"{digits if '.' in digits else digits + '.0'}{exponent}{power}"
    return json.dumps(value)
