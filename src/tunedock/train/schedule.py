"""Schedules of the learning rate by transformers' names."""

from __future__ import annotations

import difflib

import torch
from torch.optim.lr_scheduler import LRScheduler
from transformers import SchedulerType, get_scheduler

from tunedock.errors import RecipeError
from tunedock.plan.steps import warmup_steps
from tunedock.recipe.schema import Train


def make_schedule(optimizer: torch.optim.Optimizer, train: Train, total_steps: int) -> LRScheduler:
    """The schedule `train.lr_scheduler_type` names. Raises RecipeError for an unknown name and arguments it does not take."""
    known = [kind.value for kind in SchedulerType]
    if train.lr_scheduler_type not in known:
        near = difflib.get_close_matches(train.lr_scheduler_type, known, n=1)
        raise RecipeError(
            f"there is no schedule `{train.lr_scheduler_type}`",
            where="train.lr_scheduler_type",
            hint=f"did you mean `{near[0]}`?" if near else f"known: {', '.join(sorted(known))}",
        )
    try:
        schedule: LRScheduler = get_scheduler(
            train.lr_scheduler_type,
            optimizer,
            num_warmup_steps=warmup_steps(train.warmup_steps, total_steps),
            num_training_steps=total_steps,
            scheduler_specific_kwargs=train.lr_scheduler_kwargs or None,
        )
    except (ValueError, TypeError, KeyError) as error:
        raise RecipeError(
            f"this schedule cannot be made: {error}",
            where=f"train.lr_scheduler_type: {train.lr_scheduler_type}",
            hint="its arguments go to train.lr_scheduler_kwargs",
        ) from None
    return schedule
