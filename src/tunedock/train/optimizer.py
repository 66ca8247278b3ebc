"""What turns gradients into an update: gradient scaling for float16, clipping, the optimizer, the schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from tunedock.recipe.schema import Train
from tunedock.train.optimizer_names import make_optimizer
from tunedock.train.schedule import make_schedule


@dataclass(slots=True)
class Updater:
    """Unscale, clip, step, schedule.

    A schedule-free optimizer (Defazio et al. 2024, arXiv 2405.15682) takes its gradients at other weights than those it found best,
    their average: `to_training` and `to_evaluation` exchange the two. Checkpoints hold those of training.
    """

    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    schedule: LRScheduler
    scaler: torch.amp.GradScaler
    max_grad_norm: float

    def backward(self, loss: torch.Tensor) -> None:
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def drop(self) -> None:
        """Forgets the gradients of a step that is not finished."""
        self.optimizer.zero_grad(set_to_none=True)

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
    def averages(self) -> bool:
        """Whether the weights to evaluate are others than those that train."""
        return hasattr(self.optimizer, "eval")

    def to_training(self) -> None:
        if self.averages:
            self.optimizer.train()  # type: ignore[attr-defined]

    def to_evaluation(self) -> None:
        if self.averages:
            self.optimizer.eval()  # type: ignore[attr-defined]

    @property
    def learning_rate(self) -> float:
        """Of the last step; that of the next before the schedule took it."""
        group = self.optimizer.param_groups[0]
        return float(group.get("scheduled_lr") or group["lr"])


def make_updater(
    named: list[tuple[str, nn.Parameter]],
    train: Train,
    *,
    total_steps: int,
    device: torch.device,
    model: nn.Module | None = None,
    loraplus_lr_ratio: float | None = None,
) -> Updater:
    """`model`: whose parameters these are, for optimizers that treat embeddings and heads apart. `loraplus_lr_ratio`: as
    `train.groups` takes it."""
    optimizer = make_optimizer(named, train, model=model, total_steps=total_steps, loraplus_lr_ratio=loraplus_lr_ratio)
    return Updater(
        parameters=[p for _, p in named],
        optimizer=optimizer,
        schedule=make_schedule(optimizer, train, total_steps),
        scaler=torch.amp.GradScaler(device.type, enabled=train.fp16),
        max_grad_norm=train.max_grad_norm,
    )
