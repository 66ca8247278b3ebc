"""An optimizer's state as tensors and plain JSON, and back: what a checkpoint keeps of it.

Packages keep more than tensors: numbers, nested dicts (bitsandbytes), tensors among a group's settings (torch-optimi), and objects
that hold a projection (GaLore, APOLLO). All of it becomes one tree of JSON in which a tensor is named by its place. The classes
that may stand in a checkpoint are listed here; nothing else is ever made from one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

PROJECTORS: Mapping[str, tuple[str, str]] = {
    "galore": ("galore_torch.galore_projector", "GaLoreProjector"),
    "apollo": ("apollo_torch.random_projector", "GradientProjector"),
    "apollo-svd": ("apollo_torch.svd_projector", "GaLoreProjector"),
}
"""Name in a checkpoint -> module and class."""

TENSOR, TUPLE, OBJECT = "$tensor", "$tuple", "$object"


def on_the_cpu(tensor: Tensor, *, copy: bool = False) -> Tensor:
    """With `copy` no later step changes it; without, one that is there anyway is given as it is."""
    return tensor.detach().to("cpu", copy=copy).contiguous()


def optimizer_state(
    optimizer: torch.optim.Optimizer, read: Callable[[Tensor], Tensor] = on_the_cpu
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors by name and a tree of plain values. `read`: what is kept of a tensor."""
    packing = _Packing(read)
    tree: dict[str, Any] = packing.pack(optimizer.state_dict(), "")
    return packing.tensors, tree


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What `optimizer_state` would hold, without moving anything."""
    packing = _Packing(lambda tensor: tensor, apart=False)
    packing.pack(optimizer.state_dict(), "")
    return sum(tensor.numel() * tensor.element_size() for tensor in packing.tensors.values())


def plain_state(value: Any) -> Any:
    """Settings of an optimizer's groups as JSON. Raises TypeError for what is none."""
    packing = _Packing(on_the_cpu)
    packed = packing.pack(value, "")
    if packing.tensors:
        raise TypeError(f"a setting of the optimizer is a tensor: {next(iter(packing.tensors))}")
    return packed


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], tree: dict[str, Any]) -> None:
    whole = unpacked(tree, tensors)
    whole["state"] = {int(index): entries for index, entries in whole["state"].items()}
    optimizer.load_state_dict(whole)
    _to_their_devices(optimizer)


class _Packing:
    def __init__(self, read: Callable[[Tensor], Tensor], *, apart: bool = True) -> None:
        """`apart`: no two of the tensors share memory."""
        self._read = read
        self._apart = apart
        self.tensors: dict[str, Tensor] = {}
        self._held: set[int] = set()

    def pack(self, value: Any, place: str) -> Any:
        if isinstance(value, Tensor):
            self.tensors[place] = self._own(value)
            return {TENSOR: place}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, Mapping):
            return {str(key): self.pack(child, f"{place}/{key}" if place else str(key)) for key, child in value.items()}
        if isinstance(value, list | tuple):
            packed = [self.pack(child, f"{place}/{index}") for index, child in enumerate(value)]
            return {TUPLE: packed} if isinstance(value, tuple) else packed
        for name, (module, kind) in PROJECTORS.items():
            if type(value).__module__ == module and type(value).__name__ == kind:
                return {OBJECT: name, "values": self.pack(vars(value), place)}
        raise TypeError(f"a checkpoint does not hold the optimizer's {place}, a {type(value).__name__}")

    def _own(self, value: Tensor) -> Tensor:
        """Safetensors refuses two names for one memory; bitsandbytes has one table of digits for all parameters."""
        kept = self._read(value)
        if not self._apart:
            return kept
        if kept.numel() and kept.untyped_storage().data_ptr() in self._held:
            kept = kept.clone()
        self._held.add(kept.untyped_storage().data_ptr())
        return kept


def unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What was packed, with the tensors in their places."""
    if isinstance(value, list):
        return [unpacked(child, tensors) for child in value]
    if not isinstance(value, dict):
        return value
    if TENSOR in value:
        return tensors[value[TENSOR]]
    if TUPLE in value:
        return tuple(unpacked(child, tensors) for child in value[TUPLE])
    if OBJECT in value:
        module, kind = PROJECTORS[value[OBJECT]]
        cls = getattr(import_module(module), kind)
        made = object.__new__(cls)
        vars(made).update(unpacked(value["values"], tensors))
        return made
    return {key: unpacked(child, tensors) for key, child in value.items()}


def _to_their_devices(optimizer: torch.optim.Optimizer) -> None:
    """`load_state_dict` moves tensors to their parameter's device, but does not look into objects."""
    kinds = {kind for _, kind in PROJECTORS.values()}
    for parameter, entries in optimizer.state.items():
        for value in entries.values():
            if type(value).__name__ in kinds:
                for name, held in vars(value).items():
                    if isinstance(held, Tensor):
                        setattr(value, name, held.to(parameter.device))
                    elif isinstance(held, list) and held and isinstance(held[0], Tensor):
                        setattr(value, name, [part.to(parameter.device) for part in held])
