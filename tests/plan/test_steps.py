"""Steps by arithmetic: exact, and as trainers count that drop the last partial batch."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunedock.plan.steps import StepPlan, floor_steps, plan_steps, warmup_steps


def test_the_documented_figures() -> None:
    """2876 rows, 15 % for validation: 2444 to train on; batch 16, three epochs."""
    examples = 2876 - math.ceil(2876 * 0.15)
    assert examples == 2444
    assert plan_steps(examples, 16, 3.0) == StepPlan(153, 459, 3 * 2444, 3.0)
    floor = floor_steps(examples, 16, 3.0)
    assert (floor.steps_per_epoch, floor.total_steps, floor.examples_seen) == (152, 456, 456 * 16)


@pytest.mark.parametrize(
    ("examples", "batch", "epochs", "max_steps", "per_epoch", "total", "seen"),
    [
        (100, 10, 1.0, -1, 10, 10, 100),
        (101, 10, 1.0, -1, 11, 11, 101),
        (100, 10, 0.5, -1, 10, 5, 50),
        (101, 10, 0.5, -1, 11, 6, 60),
        (100, 10, 1.5, -1, 10, 15, 150),
        (300, 10, 0.1, -1, 30, 3, 30),
        (3, 16, 3.0, -1, 1, 3, 9),
        (3, 16, 0.01, -1, 1, 1, 3),
        (100, 10, 3.0, 7, 10, 7, 70),
        (101, 10, 3.0, 12, 11, 12, 111),
        (1, 1, 1.0, -1, 1, 1, 1),
    ],
)
def test_plan(examples: int, batch: int, epochs: float, max_steps: int, per_epoch: int, total: int, seen: int) -> None:
    plan = plan_steps(examples, batch, epochs, max_steps)
    assert (plan.steps_per_epoch, plan.total_steps, plan.examples_seen) == (per_epoch, total, seen)
    assert plan.epochs == pytest.approx(seen / examples)


@given(st.integers(1, 10_000), st.integers(1, 300), st.integers(1, 5))
def test_whole_epochs_see_every_example_once_each(examples: int, batch: int, epochs: int) -> None:
    plan = plan_steps(examples, batch, float(epochs))
    assert plan.examples_seen == examples * epochs
    assert plan.total_steps == plan.steps_per_epoch * epochs
    assert (plan.steps_per_epoch - 1) * batch < examples <= plan.steps_per_epoch * batch


def test_numbers_that_cannot_be() -> None:
    for arguments in ((0, 1, 1.0), (1, 0, 1.0), (1, 1, 0.0), (1, 1, float("inf")), (1, 1, float("nan"))):
        with pytest.raises(ValueError, match="positive"):
            plan_steps(*arguments)


@pytest.mark.parametrize(
    ("warmup", "total", "steps"),
    [(0.0, 100, 0), (0.1, 100, 10), (0.03, 459, 14), (0.1, 30, 3), (1.0, 9, 1), (50.0, 9, 50)],
)
def test_warmup_as_share_or_count(warmup: float, total: int, steps: int) -> None:
    assert warmup_steps(warmup, total) == steps
