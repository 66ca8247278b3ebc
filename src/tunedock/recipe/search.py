"""The `search` section: which keys of the recipe are tried with which values. `tunedock search` reads it, `train` does not."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from tunedock.recipe.section import Section, Seed


class Dimension(Section):
    """The values of one key: exactly one of these."""

    choice: list[Any] | None = None
    """These values."""
    uniform: list[float] | None = None
    """Any number from the first to the second."""
    log_uniform: list[float] | None = None
    """The same, orders of magnitude equally likely."""
    int_uniform: list[int] | None = None
    """Any whole number from the first to the second, both included."""

    @property
    def form(self) -> str:
        return next(name for name in type(self).model_fields if getattr(self, name) is not None)

    @property
    def low(self) -> float:
        return min(self._bounds)

    @property
    def high(self) -> float:
        return max(self._bounds)

    @property
    def _bounds(self) -> list[float]:
        return list(self.uniform or self.log_uniform or self.int_uniform or [])

    @model_validator(mode="after")
    def _one_that_makes_sense(self) -> Dimension:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError("should be exactly one of choice, uniform, log_uniform and int_uniform")
        if self.choice is not None:
            if len(self.choice) < 2 or any(value in self.choice[:at] for at, value in enumerate(self.choice)):
                raise ValueError("should be two values or more, each once")
        elif len(self._bounds) != 2 or self._bounds[0] >= self._bounds[1]:
            raise ValueError("should be two numbers, the smaller first")
        elif self.log_uniform is not None and self.low <= 0:
            raise ValueError("should be numbers above 0: they are taken by orders of magnitude")
        return self


class Search(Section):
    trials: PositiveInt = 20
    """Runs in all, those that were pruned or failed among them."""
    metric: Annotated[str, Field(pattern=r"^eval_\S+$")] = "eval_loss"
    """A metric of the validation rows."""
    direction: Literal["minimize", "maximize"] = "minimize"
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    """`tpe` learns from the trials before, `grid` takes every combination of choices."""
    pruner: Literal["median", "hyperband", "none"] = "median"
    """Ends a trial early: when it is worse than the median of the others at the same step, or by rounds of hyperband."""
    timeout_s: PositiveFloat | None = None
    """No trial begins after so many seconds."""
    seed: Seed = 42
    space: dict[str, Dimension] = Field(min_length=1)
    """Dotted key of the recipe -> its values."""
