"""Optimizers and schedules by the names transformers uses; gradient scaling for float16."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import SchedulerType, get_scheduler

from tunedock.errors import DependencyError, NotBuiltError, RecipeError
from tunedock.plan.steps import warmup_steps
from tunedock.recipe.schema import Train

_FUSED = ("cpu", "cuda")
"""Devices on which one kernel updates all of AdamW's parameters; elsewhere PyTorch chooses."""


@dataclass(slots=True)
class Updater:
    """What turns gradients into an update: unscale, clip, step, schedule."""

    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    schedule: LRScheduler
    scaler: torch.amp.GradScaler
    max_grad_norm: float

    def backward(self, loss: torch.Tensor) -> None:
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def norm(self) -> float:
        """Of the gradients as they are, scaled where there is a scale."""
        return float(torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None]))

    def clip(self) -> float:
        """Unscales and clips the gradients; returns their norm before clipping."""
        self.scaler.unscale_(self.optimizer)
        return float(torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm or math.inf))

    def update(self) -> bool:
        """One optimizer step, after `clip`. Returns whether it was taken.

        With float16 a step whose gradients overflowed is left out and the scale halved, as `torch.amp` does.
        """
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        taken = not self.scaler.is_enabled() or self.scaler.get_scale() >= scale
        self.optimizer.zero_grad(set_to_none=True)
        if taken and not isinstance(self.schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.schedule.step()
        return taken

    def plateau(self, metric: float) -> None:
        """Tells a schedule that follows the validation loss (reduce_lr_on_plateau) what it was."""
        if isinstance(self.schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.schedule.step(metric)

    @property
    def learning_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])


def make_updater(
    named: list[tuple[str, nn.Parameter]], train: Train, *, total_steps: int, device: torch.device
) -> Updater:
    optimizer = make_optimizer(named, train)
    return Updater(
        parameters=[p for _, p in named],
        optimizer=optimizer,
        schedule=make_schedule(optimizer, train, total_steps),
        scaler=torch.amp.GradScaler(device.type, enabled=train.fp16),
        max_grad_norm=train.max_grad_norm,
    )


def make_optimizer(named: list[tuple[str, nn.Parameter]], train: Train) -> torch.optim.Optimizer:
    """The optimizer `train.optim` names. Weight decay spares biases and norms (parameters of one dimension).

    Raises RecipeError for an unknown name and DependencyError when the optimizer's package is missing.
    """
    groups = [
        {"params": [p for _, p in named if p.ndim > 1], "weight_decay": train.weight_decay},
        {"params": [p for _, p in named if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if train.learning_rate is None:
        raise ValueError("train.learning_rate is filled in by recipe.resolve")
    if train.optim in ("adamw_torch", "adamw_torch_fused") and not train.optim_args:
        return torch.optim.AdamW(
            groups,
            lr=train.learning_rate,
            betas=(train.adam_beta1, train.adam_beta2),
            eps=train.adam_epsilon,
            fused=train.optim == "adamw_torch_fused" or all(p.device.type in _FUSED for _, p in named) or None,
        )
    return _by_transformers(groups, train)


def _by_transformers(groups: list[dict[str, Any]], train: Train) -> torch.optim.Optimizer:
    from transformers import Trainer, TrainingArguments
    from transformers.training_args import OptimizerNames

    if train.optim.startswith("schedule_free"):
        raise NotBuiltError(
            f"`optim: {train.optim}` is not built yet: its weights differ between training and evaluation",
            where="train.optim",
            hint="use adamw_torch with a schedule",
        )
    known = [name.value for name in OptimizerNames]
    if train.optim not in known:
        raise RecipeError(
            f"there is no optimizer `{train.optim}`", where="train.optim", hint=_nearest(train.optim, known)
        )
    if train.optim_args and not all("=" in part for part in train.optim_args.split(",")):
        raise RecipeError(
            "the optimizer's arguments are `key=value,key=value`", where=f"train.optim_args: {train.optim_args}"
        )
    shared = TrainingArguments(
        output_dir="unused",
        optim=train.optim,
        learning_rate=train.learning_rate,
        weight_decay=train.weight_decay,
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        adam_epsilon=train.adam_epsilon,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
    )
    try:
        _, plain = Trainer.get_optimizer_cls_and_kwargs(shared)
        shared.optim_args = train.optim_args
        kind, keywords = Trainer.get_optimizer_cls_and_kwargs(shared)
        if train.optim_args and keywords == plain:
            raise RecipeError(
                f"`{train.optim}` does not use them", where=f"train.optim_args: {train.optim_args}", hint="drop them"
            )
        optimizer: torch.optim.Optimizer = kind(groups, **keywords)
    except (ImportError, RuntimeError) as error:
        raise DependencyError(
            f"the optimizer needs a package or a device that is not here: {str(error).splitlines()[0]}",
            where=f"train.optim: {train.optim}",
            hint="install it, or use adamw_torch",
        ) from None
    except (ValueError, TypeError) as error:
        raise RecipeError(
            f"the optimizer refuses: {str(error).splitlines()[0]}", where=f"train.optim: {train.optim}"
        ) from None
    return optimizer


def make_schedule(optimizer: torch.optim.Optimizer, train: Train, total_steps: int) -> LRScheduler:
    """The schedule `train.lr_scheduler_type` names. Raises RecipeError for an unknown name and arguments it does not take."""
    known = [kind.value for kind in SchedulerType]
    if train.lr_scheduler_type not in known:
        raise RecipeError(
            f"there is no schedule `{train.lr_scheduler_type}`",
            where="train.lr_scheduler_type",
            hint=_nearest(train.lr_scheduler_type, known),
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


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean `{near[0]}`?" if near else f"known: {', '.join(sorted(known))}"
