"""A recipe's `parallel` and `offload` -> how its model and updater are spread over the ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tunedock.errors import RecipeError
from tunedock.model import world
from tunedock.model.policy import Policy
from tunedock.recipe.schema import Recipe
from tunedock.train.optimizer import Updater
from tunedock.train.parallel.deepspeed_config import deepspeed_config, read_deepspeed, stage_of
from tunedock.train.parallel.replicated import ReplicatedUpdater
from tunedock.train.parallel.sharded import ShardedUpdater, shard
from tunedock.train.parallel.zero import zeroed

Way = Literal["alone", "ddp", "fsdp", "zero1", "zero2", "zero3"]


def way_of(recipe: Recipe) -> Way:
    """How this run is spread. Raises RecipeError for a DeepSpeed file of another stage than the recipe's."""
    if not world.together():
        return "alone"
    if recipe.train.deepspeed is None:
        return "ddp" if recipe.parallel == "auto" else recipe.parallel
    path = Path(recipe.train.deepspeed)
    asked: Way = ("ddp", "zero1", "zero2", "zero3")[stage_of(read_deepspeed(path), path)]
    if recipe.parallel not in ("auto", asked):
        raise RecipeError(
            f"the DeepSpeed file asks for {asked}, and the recipe for {recipe.parallel}",
            where="parallel",
            hint="leave `parallel` out, or let both say the same",
        )
    return asked


def shards_weights(way: Way) -> bool:
    """Whether no rank has the whole model on its device."""
    return way in ("fsdp", "zero3")


def shard_weights(policy: Policy, way: Way, recipe: Recipe) -> None:
    """Before the updater is made, whose parameters are the sharded ones. DeepSpeed does it with the updater."""
    if way == "fsdp":
        shard(policy, offload=recipe.offload != "none")


def spread_updater(plain: Updater, policy: Policy, way: Way, recipe: Recipe) -> Updater:
    """The updater for the way, in place of one process's; for ZeRO the policy's model is DeepSpeed's engine after it."""
    if way == "alone":
        return plain
    if way.startswith("zero"):
        given = None if recipe.train.deepspeed is None else read_deepspeed(Path(recipe.train.deepspeed))
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
