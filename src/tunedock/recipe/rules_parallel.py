"""Rules about training over many processes. `parallel: auto` breaks none: what it becomes keeps to them too (`why_not_by`)."""

from __future__ import annotations

import re

from tunedock.recipe.objectives.rollout import OpenAIEngine, Rollout
from tunedock.recipe.optimizers import Facts, table
from tunedock.recipe.rule import Rule
from tunedock.recipe.schema import Recipe

ELEMENT_BY_ELEMENT = frozenset({"adamw_torch", "adamw_torch_fused", "sgd", "rmsprop", "adagrad"})
"""Optimizers that do the same to a number wherever it stands, so that ZeRO's flat shares of all numbers are as good as matrices."""

ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]]+):([1-9]\d{0,4})")


def _zero(recipe: Recipe) -> bool:
    return recipe.parallel.startswith("zero")


def _shares(recipe: Recipe) -> bool:
    """Whether anything of the model is divided over the processes."""
    return recipe.parallel == "fsdp" or _zero(recipe)


def _reads_whole_tensors(recipe: Recipe) -> bool:
    facts = table().get(recipe.train.optim, Facts())
    return facts.low_rank is not None or facts.package == "bitsandbytes"


def _offload_without_shares(recipe: Recipe) -> bool:
    allowed = {"optimizer": ("zero1", "zero2", "zero3"), "all": ("zero3", "fsdp"), "none": (recipe.parallel,)}
    return recipe.parallel not in allowed[recipe.offload]


def _engine_of_one(recipe: Recipe) -> bool:
    engine = recipe.objective.engine if isinstance(recipe.objective, Rollout) else None
    many = recipe.launch.nodes > 1 or (recipe.launch.processes or 1) > 1
    return isinstance(engine, OpenAIEngine) and (many or _shares(recipe))


def _no_address(recipe: Recipe) -> bool:
    given = recipe.launch.rendezvous
    found = ADDRESS.fullmatch(given) if given is not None else None
    return given is not None and (found is None or int(found.group(2)) > 65535)


PARALLEL_RULES: tuple[Rule, ...] = (
    Rule(
        name="quantized-weights-in-shares",
        keys=("parallel", "quantize"),
        broken=lambda r: _shares(r) and r.quantize != "none",
        message="quantised weights are not divided over processes yet",
        hint="use `parallel: ddp`: each device holds the base, in few bits, and what is trained of it is small",
    ),
    Rule(
        name="scaled-gradients-in-shares",
        keys=("parallel", "train.fp16"),
        broken=lambda r: _shares(r) and r.train.fp16,
        message="float16's gradients are scaled, and with shares of them no process knows alone whether one has overflowed",
        hint="use `train.bf16: true`, or `parallel: ddp`",
    ),
    Rule(
        name="optimizer-in-flat-shares",
        keys=("parallel", "train.optim"),
        broken=lambda r: _zero(r) and r.train.optim in table() and r.train.optim not in ELEMENT_BY_ELEMENT,
        message="ZeRO divides all numbers as one flat list, and this optimizer looks at whole matrices or writes weights itself",
        hint="use `parallel: fsdp` or `ddp`, or `train.optim: adamw_torch`",
    ),
    Rule(
        name="optimizer-in-shares",
        keys=("parallel", "train.optim"),
        broken=lambda r: r.parallel == "fsdp" and _reads_whole_tensors(r),
        message="FSDP2 leaves each process a share of every tensor, and this optimizer reads whole ones",
        hint="use `parallel: ddp`, or `train.optim: adamw_torch`, whose states are divided as the weights are",
    ),
    Rule(
        name="offload-without-shares",
        keys=("offload", "parallel"),
        broken=_offload_without_shares,
        message="`offload: optimizer` goes with `parallel: zero1`, `zero2` or `zero3`, `offload: all` with `zero3` or `fsdp`",
        hint="name one of them as `parallel`, or drop `offload`",
    ),
    Rule(
        name="nodes-without-a-meeting",
        keys=("launch.nodes", "launch.rendezvous"),
        broken=lambda r: r.launch.nodes > 1 and r.launch.rendezvous is None and r.launch.on != "compose",
        message="the machines do not know where to meet",
        hint="give node 0's address and a free port there: `launch.rendezvous: 10.0.0.1:29500`",
    ),
    Rule(
        name="compose-numbers-its-nodes",
        keys=("launch.on", "launch.node_rank", "launch.rendezvous"),
        broken=lambda r: (
            r.launch.on == "compose" and (r.launch.node_rank is not None or r.launch.rendezvous is not None)
        ),
        message="`launch.on: compose` starts all nodes, on this machine, and knows where they meet",
        hint="drop `launch.node_rank` and `launch.rendezvous`; for several machines use `launch.on: docker` on each",
    ),
    Rule(
        name="rendezvous-is-no-address",
        keys=("launch.rendezvous",),
        broken=_no_address,
        message="`launch.rendezvous` is an address with a port",
        hint="write for example `10.0.0.1:29500`, `node-0:29500` or `[fd00::1]:29500`",
    ),
    Rule(
        name="node-beyond-the-nodes",
        keys=("launch.node_rank", "launch.nodes"),
        broken=lambda r: r.launch.node_rank is not None and r.launch.node_rank >= r.launch.nodes,
        message="`launch.node_rank` counts from 0, so the last node is one below `launch.nodes`",
        hint="number the machines 0, 1, ...",
    ),
    Rule(
        name="engine-of-many-processes",
        keys=("objective.engine.kind", "launch.nodes", "launch.processes", "parallel"),
        broken=_engine_of_one,
        message="an engine is given the whole adapter by one process, and this run has many, or each a share of it",
        hint="use `launch.processes: 1`, or let the answers be made here: `objective.engine: local`",
    ),
)


def why_not_by(recipe: Recipe, parallel: str) -> str | None:
    """Why a recipe cannot be trained that way: what `parallel: auto` asks before it chooses."""
    tried = recipe.model_copy(update={"parallel": parallel})
    return next((rule.message for rule in PARALLEL_RULES if "parallel" in rule.keys and rule.broken(tried)), None)
