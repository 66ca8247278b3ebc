"""A recipe's `parallel` and `offload` -> how its model and updater are spread over the ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tunedock.errors import ModelError
from tunedock.model import world
from tunedock.model.load import find_device, precision, require_config
from tunedock.model.policy import Policy
from tunedock.model.session import Base
from tunedock.plan.memory import plan_memory
from tunedock.plan.rollout_memory import answering
from tunedock.plan.rungs import HEADROOM
from tunedock.recipe.deepspeed import content_of
from tunedock.recipe.rules_parallel import why_not_by
from tunedock.recipe.schema import Recipe
from tunedock.train.memory import memory_of
from tunedock.train.optimizer import Updater
from tunedock.train.parallel.deepspeed_config import deepspeed_config
from tunedock.train.parallel.filling import Filling
from tunedock.train.parallel.replicated import ReplicatedUpdater
from tunedock.train.parallel.sharded import ShardedUpdater, shard
from tunedock.train.parallel.zero import zeroed
from tunedock.train.planning import number

Way = Literal["alone", "ddp", "fsdp", "zero1", "zero2", "zero3"]


def way_of(recipe: Recipe, base: Base, *, longest_path: int) -> Way:
    """How this run is spread."""
    if not world.together():
        return "alone"
    return _fitting(recipe, base, longest_path) if recipe.parallel == "auto" else recipe.parallel


def _fitting(recipe: Recipe, base: Base, longest_path: int) -> Way:
    """Whole on each device where, by the plan, it fits there with the longest sample; else sharded, if the recipe can be."""
    if why_not_by(recipe, "fsdp") is not None:
        return "ddp"
    device = find_device()
    numbers = precision(recipe, device)
    try:
        plan = plan_memory(
            require_config(base.located.folder),
            adapter=recipe.adapter,
            optim=recipe.train.optim,
            optim_args=recipe.train.optim_args,
            weights=number(numbers.weights),
            compute=number(numbers.compute),
            quantize=recipe.quantize,
            gradient_checkpointing=recipe.train.gradient_checkpointing,
            longest_path=longest_path,
            device=device.type,
            scored=base.head == "scores",
            valued=recipe.objective.kind == "ppo",
            answering=answering(recipe),
        )
    except ModelError:
        return "ddp"  # as one process would try it
    free = memory_of(device).free_bytes() // (1 if device.type == "cuda" else world.size_here())
    return "fsdp" if world.agree(plan.needed(longest_path) > HEADROOM * free) else "ddp"


def shards_weights(way: Way) -> bool:
    """Whether no rank has the whole model on its device."""
    return way in ("fsdp", "zero3")


def shard_weights(policy: Policy, way: Way, recipe: Recipe) -> None:
    """Before the updater is made, whose parameters are the sharded ones. DeepSpeed does it with the updater, and hands the first
    rank's weights out as it does."""
    if way == "fsdp":
        shard(policy, offload=recipe.offload != "none")
    elif way == "zero3":
        Filling(policy.model, policy.device).make_room()


def spread_updater(plain: Updater, policy: Policy, way: Way, recipe: Recipe) -> Updater:
    """The updater for the way, in place of one process's; for ZeRO the policy's model is DeepSpeed's engine after it."""
    if way == "alone":
        return plain
    if way.startswith("zero"):
        given = None if recipe.train.deepspeed is None else content_of(Path(recipe.train.deepspeed))
        config = deepspeed_config(
            int(way[-1]),
            ranks=world.size(),
            offload=recipe.offload,
            max_grad_norm=recipe.train.max_grad_norm,
            given=given,
        )
        return zeroed(policy, plain, config)
    cls = ReplicatedUpdater if way == "ddp" else ShardedUpdater
    return cls(plain.named, plain.optimizer, plain.schedule, plain.scaler, plain.max_grad_norm)
