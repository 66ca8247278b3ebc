"""Rules about `launch.container`. What depends on the machine, its engine and other runs is looked at when a run starts."""

from __future__ import annotations

from tunedock.recipe.container import size_bytes
from tunedock.recipe.rule import Rule
from tunedock.recipe.schema import Recipe


def _shm_without_room(recipe: Recipe) -> bool:
    given = recipe.launch.container
    asked = given.memory is not None and given.shm_size != "auto"
    return asked and size_bytes(given.shm_size) > size_bytes(str(given.memory))


def _out_of_reach(recipe: Recipe) -> bool:
    launch = recipe.launch
    return launch.on != "local" and launch.nodes > 1 and launch.container.network in ("none", "bridge")


CONTAINER_RULES: tuple[Rule, ...] = (
    Rule(
        name="shm-larger-than-memory",
        keys=("launch.container.shm_size", "launch.container.memory"),
        broken=_shm_without_room,
        message="what stands in /dev/shm counts as the container's memory, and `shm_size` is more than there is of it",
        hint="leave it at `auto`, or raise `launch.container.memory`",
    ),
    Rule(
        name="mps-without-a-gpu",
        keys=("launch.container.mps", "launch.container.gpus"),
        broken=lambda r: r.launch.container.mps is not None and r.launch.container.gpus == "none",
        message="`mps` is a share of a GPU, and the container gets none",
        hint="drop `launch.container.mps`, or give it a GPU: `launch.container.gpus: 1`",
    ),
    Rule(
        name="nodes-out-of-reach",
        keys=("launch.container.network", "launch.nodes"),
        broken=_out_of_reach,
        message="machines of one training reach each other at their own addresses, which this network hides",
        hint="use `launch.container.network: host`, or leave it at `auto`",
    ),
)
