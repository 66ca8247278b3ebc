"""`parallel: ddp`: the whole model on every rank, gradients added up once a step.

PyTorch's DistributedDataParallel is not used: it takes the mean over ranks, wants to know which backward pass is a step's last, and
reduces in it while it runs, which a step that may have to be done again cannot have. What it would gain is that sending overlaps
with the last row's backward pass; LoRA's gradients are a few megabytes.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tunedock.errors import ModelError
from tunedock.model import world
from tunedock.train.optimizer import Updater, require_same_names
from tunedock.train.optimizer_state import restore_optimizer

BUCKET_BYTES = 1 << 25
"""Gradients sent at once: one call for each parameter would wait for the network each time."""

SUMMED_AT_ONCE = 1 << 24
"""Numbers: on a CPU they are widened first."""

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes."""


@dataclass(slots=True)
class ReplicatedUpdater(Updater):
    def gather(self) -> None:
        for bucket in _buckets(self._gradients()):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            world.add_up(flat)
            parts = torch.split(flat, [gradient.numel() for gradient in bucket])
            for gradient, part in zip(bucket, parts, strict=True):
                gradient.copy_(part.reshape(gradient.shape))

    def _gradients(self) -> Iterator[Tensor]:
        """Of each parameter that has one on any rank, in one order: a rank whose rows did not reach it adds zeros."""
        reached = torch.tensor([p.grad is not None for p in self.parameters], dtype=torch.int32)
        for parameter, anywhere in zip(self.parameters, world.add_up(reached).tolist(), strict=True):
            if anywhere and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if parameter.grad is not None:
                yield parameter.grad

    def trained_state(self, *, copy: bool = False) -> dict[str, Tensor]:
        return super(ReplicatedUpdater, self).trained_state(copy=copy) if world.rank() == 0 else {}

    def load_trained(self, state: Mapping[str, Tensor]) -> None:
        whole = dict(world.tensors_of_first(state))
        require_same_names(whole, self.named)
        super(ReplicatedUpdater, self).load_trained(whole)

    def optimizer_state(self, *, copy: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return super(ReplicatedUpdater, self).optimizer_state(copy=copy) if world.rank() == 0 else ({}, {})

    def restore(self, tensors: Mapping[str, Tensor], tree: dict[str, Any]) -> None:
        restore_optimizer(self.optimizer, dict(world.tensors_of_first(tensors)), world.told_by_first(tree))


def _buckets(gradients: Iterator[Tensor]) -> Iterator[Sequence[Tensor]]:
    """Of one type each, and no larger than `BUCKET_BYTES` unless one alone is."""
    bucket: list[Tensor] = []
    size = 0
    for gradient in gradients:
        own = gradient.numel() * gradient.element_size()
        if bucket and (gradient.dtype != bucket[0].dtype or size + own > BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += own
    if bucket:
        yield bucket


def require_same_weights(model: nn.Module) -> None:
    """Raises ModelError where a rank has other weights than the first one, trained or frozen: another file, or an adapter that its
    machine has made otherwise. Sums of bits, which are the same in any order. A collective call."""
    own = {name: _bits(parameter.data) for name, parameter in model.named_parameters()}
    (host, first), *others = world.told_by_all([socket.gethostname(), own])
    for number, (other_host, other) in enumerate(others, start=1):
        if strange := [name for name in first if other.get(name) != first[name]]:
            raise ModelError(
                f"rank {number} on {other_host} has other weights than rank 0 on {host}",
                where=f"{strange[0]}" + (f" and {len(strange) - 1} more" if len(strange) > 1 else ""),
                hint="copy the same model to every machine, and install the same versions of the packages",
            )


def _bits(tensor: Tensor) -> int:
    flat = tensor.reshape(-1).view(INTEGERS[tensor.element_size()])
    total = 0
    for part in torch.split(flat, SUMMED_AT_ONCE):
        total += int(part.sum(dtype=torch.int64))
    return total
