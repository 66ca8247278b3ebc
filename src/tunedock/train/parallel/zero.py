"""`parallel: zero1 | zero2 | zero3`: DeepSpeed's ZeRO. Stage 1 shards the optimizer's states, 2 gradients too, 3 weights too.

The engine is called in the model's place, for it learns from the call when to gather weights and from the output when a backward
pass begins. Its update looks at the gradients' norm, clips and steps at once, so `clip` does all of it here, and `update` the rest.
A checkpoint is put together from whole tensors by name (`deepspeed.utils.safe_*`); DeepSpeed's own would be pickled.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tunedock.errors import DependencyError
from tunedock.model import world
from tunedock.model.policy import Policy
from tunedock.train.optimizer import Updater, require_same_names
from tunedock.train.optimizer_state import TENSOR, plain_state, unpacked

Keys = Sequence[str]


@dataclass(slots=True)
class ZeroUpdater(Updater):
    engine: Any = None
    order: list[nn.Parameter] = field(default_factory=list)
    """What the optimizer was made for, before its parameters became DeepSpeed's flat ones."""
    numbered: list[list[int]] = field(default_factory=list)
    """Of each group of the optimizer, the places in `order`."""

    # -- a step --------------------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss * world.size())  # it takes the mean over ranks

    def drop(self) -> None:
        zero = self.engine.optimizer
        zero.zero_grad()
        zero.micro_step_id = 0 if self._sharded else -1  # what comes next is a step's first row
        for kept in ("averaged_gradients", "all_grad_tensors"):
            for group in getattr(zero, kept, {}):
                getattr(zero, kept)[group] = None

    def norm(self) -> float:
        from deepspeed.utils import safe_get_full_grad

        zero = self.engine.optimizer
        if not self._sharded:
            zero.finalize_gradient_accumulation_boundary()
        found = [safe_get_full_grad(parameter) for parameter in self.parameters]
        return float(torch.nn.utils.get_total_norm([gradient for gradient in found if gradient is not None]))

    def clip(self) -> float:
        """And the update, which DeepSpeed leaves out where the norm is no number."""
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def update(self) -> bool:
        if not isinstance(self.schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.schedule.step()
        return True

    # -- what a checkpoint keeps ---------------------------------------------------------------------------------------

    def trained_state(self, *, copy: bool = False) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        found = ((name, of, safe_get_full_fp32_param(of)) for name, of in self.named)
        return {name: _kept(whole, _shape(of)) for name, of, whole in found if world.rank() == 0}

    def load_trained(self, state: Mapping[str, Tensor]) -> None:
        from deepspeed import zero

        require_same_names(world.told_by_first(list(state)), self.named)
        own = dict(self.named)
        for name, tensor in world.tensors_of_first(state):
            parameter = own[name]
            there = tensor.to(self.engine.device)
            self._put(parameter, there)
            with torch.no_grad(), zero.GatheredParameters([parameter], modifier_rank=0, enabled=self._sharded):
                if not self._sharded or world.rank() == 0:
                    parameter.data.copy_(there)

    def optimizer_state(self, *, copy: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link()
        tensors: dict[str, Tensor] = {}
        state: dict[str, Any] = {}
        for group, flat in self._flats():
            entries = self._states.get(flat, {})
            for index in self.numbered[group]:
                parameter = self.order[index]
                state[str(index)] = {key: {TENSOR: f"state/{index}/{key}"} for key in entries}
                for key, value in entries.items():
                    shaped = value.shape == flat.shape
                    whole = safe_get_full_optimizer_state(parameter, key) if shaped else value
                    if world.rank() == 0:
                        tensors[f"state/{index}/{key}"] = _kept(whole, _shape(parameter) if shaped else value.shape)
        groups = [
            {**{name: value for name, value in live.items() if name != "params"}, "params": numbers}
            for live, numbers in zip(self.optimizer.param_groups, self.numbered, strict=True)
        ]
        return tensors, {"state": {i: e for i, e in state.items() if e}, "param_groups": plain_state(groups)}

    @property
    def state_bytes(self) -> int:
        kept = [value for entries in self._states.values() for value in entries.values() if isinstance(value, Tensor)]
        trained = sum(_shape(parameter).numel() * parameter.element_size() for parameter in self.parameters)
        return trained + world.size() * sum(value.numel() * value.element_size() for value in kept)

    def restore(self, tensors: Mapping[str, Tensor], tree: dict[str, Any]) -> None:
        """Of tensors that are a parameter's shape and of numbers; DeepSpeed takes only optimizers that keep no others."""
        tree = world.told_by_first(tree)
        for live, kept in zip(self.optimizer.param_groups, unpacked(tree["param_groups"], {}), strict=True):
            live.update({name: value for name, value in kept.items() if name != "params" and name in live})
        shapes = world.told_by_first({place: list(tensor.shape) for place, tensor in tensors.items()})
        self._make_states(tree["state"], shapes)
        for place, tensor in world.tensors_of_first(tensors):
            _, index, key = place.split("/")
            parameter = self.order[int(index)]
            if tensor.shape == _shape(parameter):
                self._put(parameter, tensor.to(self.engine.device), key)
            else:
                for flat in self._flats_of(int(index)):
                    self._states[flat][key].copy_(tensor)

    def _put(self, parameter: nn.Parameter, whole: Tensor, key: str | None = None) -> None:
        """Takes this rank's part of a parameter's values, or of its optimizer's state by `key`."""
        from deepspeed import utils

        if not self._sharded:
            if key is None:
                utils.safe_set_full_fp32_param(parameter, whole)
            else:
                utils.safe_set_full_optimizer_state(parameter, whole, key)
            return
        size = utils.safe_get_local_fp32_param(parameter).numel()  # the last ranks' parts may end behind the parameter
        filled = torch.nn.functional.pad(whole.flatten(), (0, size * world.size() - whole.numel()))
        part = filled[size * world.rank() : size * (world.rank() + 1)]
        if key is None:
            utils.safe_set_local_fp32_param(parameter, part)
        else:
            utils.safe_set_local_optimizer_state(parameter, part, key)

    def _make_states(self, state: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> None:
        """Empty ones, which an optimizer else makes in its first step."""
        for group, flat in self._flats():
            index = self.numbered[group][0]
            for key, value in state.get(str(index), {}).items():
                shaped = tuple(shapes[value[TENSOR]]) == tuple(_shape(self.order[index]))
                self._states[flat][key] = torch.zeros_like(flat) if shaped else torch.zeros(())
        self._link()

    def _link(self) -> None:
        """Has DeepSpeed look where the states of each parameter are. It does so once (0.19.8), after the first update of the first
        group, when the other groups have none yet."""
        if not self._sharded and all(flat in self._states for _, flat in self._flats()):
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    # -- DeepSpeed's own -----------------------------------------------------------------------------------------------

    @property
    def _sharded(self) -> bool:
        return bool(self.engine.zero_optimization_partition_weights())

    @property
    def _states(self) -> Any:
        return self.engine.optimizer.optimizer.state

    def _flats(self) -> Iterator[tuple[int, Tensor]]:
        """(group of the optimizer, a flat parameter that holds this rank's parts of the group's)."""
        zero = self.engine.optimizer
        if self._sharded:
            for number, flat in enumerate(zero.fp32_partitioned_groups_flat):
                yield zero.sub_group_to_group_id[number], flat
        else:
            yield from enumerate(zero.single_partition_of_fp32_groups)

    def _flats_of(self, index: int) -> list[Tensor]:
        return [flat for group, flat in self._flats() if index in self.numbered[group]]


def zeroed(policy: Policy, plain: Updater, config: Mapping[str, Any]) -> ZeroUpdater:
    """The updater of a policy whose model DeepSpeed takes over, by a `deepspeed_config`.

    Raises DependencyError where DeepSpeed is not installed.
    """
    deepspeed = _deepspeed(policy.device)
    order = [p for group in plain.optimizer.param_groups for p in group["params"]]
    places = {id(parameter): place for place, parameter in enumerate(order)}
    numbered = [[places[id(p)] for p in group["params"]] for group in plain.optimizer.param_groups]
    _compute_in(policy)
    engine, *_ = deepspeed.initialize(model=policy.model, optimizer=plain.optimizer, config=dict(config))
    policy.called = engine
    return ZeroUpdater(
        named=plain.named,
        optimizer=plain.optimizer,
        schedule=plain.schedule,
        scaler=plain.scaler,
        max_grad_norm=plain.max_grad_norm,
        engine=engine,
        order=order,
        numbered=numbered,
    )


def _compute_in(policy: Policy) -> None:
    """Autocast within the model's own call: DeepSpeed's engine switches off one that is entered around it."""
    if policy.precision.compute == torch.float32:
        return
    inner = policy.model.forward

    def forward(*arguments: Any, **named: Any) -> Any:
        with policy.autocast():
            return inner(*arguments, **named)

    policy.model.forward = forward


def _deepspeed(device: torch.device) -> Any:
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    try:
        import deepspeed
        from deepspeed.ops import __compatible_ops__ as compatible
    except ImportError as error:
        raise DependencyError(
            f"ZeRO is DeepSpeed's, which is not installed: {error}",
            where="parallel",
            hint="`pip install 'tunedock[deepspeed]'`, or use `parallel: fsdp`",
        ) from None
    if device.type == "cpu":
        compatible["deepspeed_shm_comm"] = False  # two minutes of compiling, for what gloo does as well
    deepspeed.logger.setLevel("WARNING")
    return deepspeed


def _shape(parameter: nn.Parameter) -> torch.Size:
    """Of the whole parameter; a sharded one is empty."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def _kept(whole: Tensor, shape: torch.Size) -> Tensor:
    return whole.detach().cpu().reshape(shape).clone()
