"""What turns gradients into an update: gradient scaling for float16, clipping, the optimizer, the schedule.

`Updater` is that of one process, which has all of it. Where several train together, `train.parallel` has updaters of the same
words whose parameters, gradients or states are spread over ranks.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from tunedock.errors import ModelError
from tunedock.recipe.schema import Train
from tunedock.train.optimizer_names import make_optimizer
from tunedock.train.optimizer_state import on_the_cpu, optimizer_state, restore_optimizer, state_bytes
from tunedock.train.schedule import make_schedule


@dataclass(slots=True)
class Updater:
    """Unscale, clip, step, schedule.

    A schedule-free optimizer (Defazio et al. 2024, arXiv 2405.15682) takes its gradients at other weights than those it found best,
    their average: `to_training` and `to_evaluation` exchange the two. Checkpoints hold those of training.
    """

    named: list[tuple[str, nn.Parameter]]
    """What is trained, by the names a checkpoint has."""
    optimizer: torch.optim.Optimizer
    schedule: LRScheduler
    scaler: torch.amp.GradScaler
    max_grad_norm: float

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for _, parameter in self.named]

    # -- a step --------------------------------------------------------------------------------------------------------

    def backward(self, loss: torch.Tensor) -> None:
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def gather(self) -> None:
        """After a step's last row: makes the gradients those of all ranks' rows. A collective call, as the next three are."""

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

    # -- what a checkpoint keeps ---------------------------------------------------------------------------------------

    def trained_state(self, *, copy: bool = False) -> dict[str, Tensor]:
        """The trained parameters by name, whole, on the CPU; on other ranks than the first, nothing. A collective call.

        With `copy` no later step changes them.
        """
        return {name: on_the_cpu(parameter, copy=copy) for name, parameter in self.named}

    def load_trained(self, state: Mapping[str, Tensor]) -> None:
        """Puts back what `trained_state` gave; of the first rank's. Raises ModelError for other parameters than the model's."""
        require_same_names(state, self.named)
        with torch.no_grad():
            for name, parameter in self.named:
                parameter.copy_(state[name])

    def optimizer_state(self, *, copy: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The optimizer's, as `train.optimizer_state` has it: the tensors whole on the first rank, and none elsewhere. A
        collective call."""
        return optimizer_state(self.optimizer, partial(on_the_cpu, copy=copy))

    @property
    def state_bytes(self) -> int:
        """Of both, as far as this rank can say without asking the others."""
        return sum(p.numel() * p.element_size() for p in self.parameters) + state_bytes(self.optimizer)

    def restore(self, tensors: Mapping[str, Tensor], tree: dict[str, Any]) -> None:
        """Puts back what `optimizer_state` gave; of the first rank's."""
        restore_optimizer(self.optimizer, tensors, tree)

    # ------------------------------------------------------------------------------------------------------------------

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


def require_same_names(state: Collection[str], named: Sequence[tuple[str, nn.Parameter]]) -> None:
    """Raises ModelError where a checkpoint holds other parameters than are trained."""
    if strange := sorted({name for name, _ in named} ^ set(state))[:3]:
        raise ModelError(f"the checkpoint holds other parameters than the model: {', '.join(strange)}")


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
        named=named,
        optimizer=optimizer,
        schedule=make_schedule(optimizer, train, total_steps),
        scaler=torch.amp.GradScaler(device.type, enabled=train.fp16),
        max_grad_norm=train.max_grad_norm,
    )
