"""Weights that the first rank has loaded, given to ranks that have the model's shape alone.

Only the first rank reads the base into host memory: eight processes of a machine that each read 140 GB would need 1.1 TB of it. The
others make the model on the meta device, and get its weights module by module, as it is sharded: no rank has more than one layer
whole beside its shards. What a weight's type is, is told too: a checkpoint may keep some of them in another one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from tunedock.errors import ModelError
from tunedock.model import world
from tunedock.model.sharding import is_sharded_parameter


class Filling:
    """The weights of one model. Every method is a collective call."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        """Raises ModelError where a rank's model is another one than the first's."""
        self._model = model
        self._device = device
        _require_same({name: [list(p.shape), p.requires_grad] for name, p in model.named_parameters()})
        types = world.told_by_first({name: _name(p.dtype) for name, p in model.named_parameters()})
        self._types = {id(p): getattr(torch, types[name]) for name, p in model.named_parameters()}
        self._fill_buffers()

    def fill(self, module: nn.Module) -> None:
        """The module's parameters on the device, with the first rank's values; those that are sharded already stay."""
        for parameter in module.parameters():
            if is_sharded_parameter(parameter):
                continue
            if parameter.is_meta:
                self._make(parameter, self._device)
            else:
                parameter.data = parameter.data.to(self._device).contiguous()
            dist.broadcast(parameter.data.view(-1).view(torch.uint8), 0)

    def make_room(self) -> None:
        """All parameters that are on the meta device, in host memory, without values: pages nobody writes to cost nothing. For what
        hands out the first rank's values itself."""
        for parameter in self._model.parameters():
            if parameter.is_meta:
                self._make(parameter, torch.device("cpu"))

    def _make(self, parameter: nn.Parameter, device: torch.device) -> None:
        """In place of one on the meta device. Tied weights stay tied."""
        values = torch.empty(parameter.shape, dtype=self._types[id(parameter)], device=device)
        _put(parameter, nn.Parameter(values, requires_grad=parameter.requires_grad))

    def _fill_buffers(self) -> None:
        """They are small, and in host memory everywhere."""
        buffers = dict(self._model.named_buffers())
        _require_same({name: [list(buffer.shape)] for name, buffer in buffers.items()})
        for name, value in world.tensors_of_first(buffers):
            if buffers[name].is_meta:  # PEFT copies rows of the base into one
                _put(buffers[name], value)
            else:
                buffers[name].copy_(value)


def _require_same(own: dict[str, list[Any]]) -> None:
    first = world.told_by_first(own)
    if strange := sorted(name for name in own.keys() | first.keys() if own.get(name) != first.get(name)):
        raise ModelError(
            f"this process makes another model than the first one: they differ in {strange[0]}",
            where=f"process {world.rank()}",
            hint="give every node the same files and the same versions of the packages",
        )


def _put(held: Tensor, value: Tensor) -> None:
    """In its place, for all who hold it."""
    torch.utils.swap_tensors(held, value)  # type: ignore[no-untyped-call]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
