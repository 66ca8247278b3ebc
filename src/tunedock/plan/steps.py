"""How many optimizer steps a run takes: pure arithmetic.

A step takes `batch_size` examples. The last step of an epoch takes what is left, so no example is skipped and none is
seen twice in an epoch. LLaMA-Factory (and any trainer that drops the last partial batch) counts whole batches only:
`floor_steps` is its number, for comparing runs step by step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tunedock.recipe.objectives.rollout import Rollout
from tunedock.recipe.schema import Recipe, Split

_ROUNDING = 1e-9  # 0.1 epochs of 30 steps is 3.0000000000000004 in floating point; that is not a fourth step


def split_sizes(rows: int, split: Split) -> tuple[int, int, int]:
    """Rows to train on, for validation, for the test: the latter two rounded up, as `train_test_split` does."""
    validation = math.ceil(rows * split.validation - _ROUNDING)
    test = math.ceil(rows * split.test - _ROUNDING)
    return rows - validation - test, validation, test


@dataclass(frozen=True, slots=True)
class StepPlan:
    steps_per_epoch: int
    """Optimizer steps of a whole epoch, its partial last step counted."""
    total_steps: int
    examples_seen: int
    """Examples over all steps, repetitions counted."""
    epochs: float
    """Passes over the data that `total_steps` make: examples seen over examples."""


def plan_steps(examples: int, batch_size: int, num_train_epochs: float, max_steps: int = -1) -> StepPlan:
    """Steps for `examples` training examples; `max_steps` overrides the epochs when positive.

    A part of an epoch is rounded up to whole steps. Raises ValueError for what no checked recipe holds: no examples, no
    batch, no epochs.
    """
    if examples < 1 or batch_size < 1:
        raise ValueError(f"examples and batch_size must be positive, got {examples} and {batch_size}")
    if max_steps < 1 and not (math.isfinite(num_train_epochs) and num_train_epochs > 0):
        raise ValueError(f"num_train_epochs must be positive, got {num_train_epochs}")
    per_epoch = math.ceil(examples / batch_size)
    total = max_steps if max_steps > 0 else max(1, math.ceil(num_train_epochs * per_epoch - _ROUNDING))
    whole, rest = divmod(total, per_epoch)
    seen = whole * examples + rest * batch_size
    return StepPlan(per_epoch, total, seen, seen / examples)


@dataclass(frozen=True, slots=True)
class RolloutPlan:
    """How prompts become optimizer steps where their answers are made while training."""

    prompts: int
    """Prompts of a rollout."""
    steps: int
    """Optimizer steps on a rollout's answers: as many as these are divided among, times how often each is trained on."""
    rollouts_per_epoch: int
    """The last one of an epoch is filled up with the epoch's first prompts."""
    total_steps: int

    @property
    def steps_per_epoch(self) -> int:
        return self.rollouts_per_epoch * self.steps

    @property
    def rollouts(self) -> int:
        return math.ceil(self.total_steps / self.steps)


def plan_rollouts(
    prompts: int,
    *,
    batch_size: int,
    answers: int,
    divided: int,
    times: int,
    num_train_epochs: float,
    max_steps: int = -1,
) -> RolloutPlan:
    """Steps for `prompts` prompts with `answers` each, `batch_size` answers a step.

    A rollout's answers are divided among `divided` steps, and trained on `times` times. Raises ValueError for what no checked
    recipe holds: no prompts, a batch that is no whole number of groups.
    """
    if prompts < 1 or batch_size < 1 or batch_size % answers:
        raise ValueError(
            f"{prompts} prompts, batches of {batch_size} and {answers} answers to a prompt do not go together"
        )
    a_rollout = batch_size // answers * divided
    steps = divided * times
    per_epoch = math.ceil(prompts / a_rollout)
    total = max_steps if max_steps > 0 else max(1, math.ceil(num_train_epochs * per_epoch - _ROUNDING)) * steps
    return RolloutPlan(a_rollout, steps, per_epoch, total)


def rollouts_of(recipe: Recipe, section: Rollout, prompts: int) -> RolloutPlan:
    """The same for a resolved recipe."""
    return plan_rollouts(
        prompts,
        batch_size=recipe.train.batch_size or 1,
        answers=section.num_generations,
        divided=section.steps_per_generation,
        times=section.times,
        num_train_epochs=recipe.train.num_train_epochs,
        max_steps=recipe.train.max_steps,
    )


def floor_steps(examples: int, batch_size: int, num_train_epochs: float, max_steps: int = -1) -> StepPlan:
    """The same where only whole batches count, and at least one step is made an epoch: LLaMA-Factory's arithmetic."""
    per_epoch = max(1, examples // batch_size)
    total = max_steps if max_steps > 0 else math.ceil(num_train_epochs * per_epoch - _ROUNDING)
    seen = total * min(batch_size, examples)
    return StepPlan(per_epoch, total, seen, seen / examples)


def warmup_steps(warmup: float, total_steps: int) -> int:
    """`train.warmup_steps` as a number of steps.

    a share of all steps when below 1 (rounded up, as transformers does), else a count.
    """
    return math.ceil(warmup * total_steps - _ROUNDING) if warmup < 1 else int(warmup)
