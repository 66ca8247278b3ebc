"""`parallel: fsdp`: weights, gradients and optimizer states sharded over ranks by PyTorch's FSDP2 (`fully_shard`).

A decoder layer's weights are gathered when it is computed, forward and backward, and let go after it. Everything that is trained is
float32 here and everything frozen is in the base's type, which FSDP2 takes side by side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from tunedock.model import adapter as adapters
from tunedock.model import world
from tunedock.model.policy import Policy
from tunedock.train.optimizer import Updater, require_same_names
from tunedock.train.optimizer_state import on_the_cpu, optimizer_state, restore_optimizer
from tunedock.train.parallel.filling import Filling


def shard(policy: Policy, *, offload: bool) -> None:
    """Spreads the policy's weights over the ranks, layer by layer as they come from the first. `offload`: they wait in host memory,
    and so do the optimizer's states."""
    model = policy.model
    mesh = init_device_mesh(policy.device.type, (world.size(),))
    waits: OffloadPolicy = CPUOffloadPolicy() if offload and policy.device.type != "cpu" else OffloadPolicy()
    filling = Filling(model, policy.device)
    for layer in adapters.checkpointable(model):
        filling.fill(layer)
        fully_shard(layer, mesh=mesh, offload_policy=waits)
    filling.fill(model)
    fully_shard(model, mesh=mesh, offload_policy=waits)
    if hasattr(model, "generate"):
        register_fsdp_forward_method(model, "generate")


@dataclass(slots=True)
class ShardedUpdater(Updater):
    def backward(self, loss: Tensor) -> None:
        (loss * world.size()).backward()  # type: ignore[no-untyped-call]  # FSDP2 takes the mean over ranks

    def norm(self) -> float:
        return _number(torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None]))

    def clip(self) -> float:
        return _number(torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm or torch.inf))

    def trained_state(self, *, copy: bool = False) -> dict[str, Tensor]:
        found = ((name, _whole(parameter)) for name, parameter in self.named)
        return {name: tensor for name, tensor in found if world.rank() == 0}

    def load_trained(self, state: Mapping[str, Tensor]) -> None:
        require_same_names(world.told_by_first(list(state)), self.named)
        own = dict(self.named)
        with torch.no_grad():
            for name, tensor in world.tensors_of_first(state):
                own[name].copy_(_sharded_like(own[name], tensor))

    def optimizer_state(self, *, copy: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, tree = optimizer_state(self.optimizer, read=_whole)
        return (tensors if world.rank() == 0 else {}), tree

    def restore(self, tensors: Mapping[str, Tensor], tree: dict[str, Any]) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        own = {}
        for place, tensor in world.tensors_of_first(tensors):
            of = _parameter_of(place, parameters)
            own[place] = tensor if of is None or of.shape != tensor.shape else _sharded_like(of, tensor)
        restore_optimizer(self.optimizer, own, world.told_by_first(tree))


def _parameter_of(place: str, parameters: list[nn.Parameter]) -> nn.Parameter | None:
    """The parameter that a tensor of an optimizer's state belongs to (`state/3/exp_avg`)."""
    parts = place.split("/")
    return parameters[int(parts[1])] if parts[0] == "state" and parts[1].isdecimal() else None


def _sharded_like(parameter: nn.Parameter, whole: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return whole.to(parameter.device)
    local = whole.to(parameter.device_mesh.device_type)
    made = distribute_tensor(local, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return made.to(parameter.device)  # waiting in host memory, where it is offloaded


def _whole(tensor: Tensor) -> Tensor:
    """On the CPU of the first rank; on the others, which help to gather it, nothing is kept. A collective call."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return on_the_cpu(whole, copy=True) if world.rank() == 0 else torch.empty(0)


def _number(norm: Tensor) -> float:
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
