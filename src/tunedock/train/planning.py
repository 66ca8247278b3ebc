"""A recipe's token budget, before its first step: the memory plan of its model, what is free, and what the run has recorded."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from tunedock.errors import ModelError
from tunedock.events import Emitter
from tunedock.model import adapter as adapters
from tunedock.model import world
from tunedock.model.kernels import kernels
from tunedock.model.policy import Policy
from tunedock.plan.memory import PARTS, MemoryPlan, Number, Part, plan_memory, readable
from tunedock.plan.rollout_memory import answering
from tunedock.plan.rungs import MOST_TOKENS
from tunedock.plan.spread import Spread, divided
from tunedock.recipe.schema import Recipe
from tunedock.run.record import read_json, write_json
from tunedock.train.budget import Budget
from tunedock.train.memory import memory_of
from tunedock.train.training import Training

RECORD = "budget.json"
"""In the run directory: every change of the budget with its step, those since the last checkpoint too."""


def make_budget(training: Training, policy: Policy, *, way: str, longest_path: int) -> Budget:
    """The budget of a run whose model is loaded and has not begun to train. A resumed one takes over what is recorded.

    `way`: how the run is spread over ranks (`train.parallel`).
    """
    run, recipe, emit = training.run, training.recipe, training.emit
    device = policy.device.type
    layers = len(adapters.checkpointable(policy.model))
    given = recipe.train.gradient_checkpointing
    again = layers if given is True else min(given, layers)

    def plan_with(layers_again: int) -> MemoryPlan | None:
        whole = _plan(recipe, policy, longest_path, layers_again, emit)
        if whole is None:
            return None
        spread = Spread.by(way, recipe.offload if device != "cpu" else "none")
        return divided(whole, spread, devices=world.size(), layers=layers)[0]

    plan = plan_with(again)

    def keep(record: list[dict[str, Any]]) -> None:
        if world.rank() == 0:
            write_json(run.path / RECORD, record)

    if plan is not None:
        family = "" if plan.known else ", by the nearest family known"
        each = readable(plan.bytes_per_token * 1024)
        made = f"; {readable(plan.answering_bytes)} while answers are made" if plan.answering else ""
        emit.note(
            f"memory plan: {readable(plan.fixed_bytes)}, and {each} for each 1,024 tokens of a row{made}{family}",
            parts=dict(plan.parts),
            answering=dict(plan.answering),
            bytes_per_token=plan.bytes_per_token,
        )
    budget = Budget(
        memory=memory_of(policy.device),
        plan=plan,
        plan_again=lambda more: None if plan is None else plan_with(more),
        most=MOST_TOKENS.get(device, MOST_TOKENS["cpu"]),
        longest_path=longest_path,
        pinned=recipe.train.token_budget,
        layers=layers if getattr(policy.model, "supports_gradient_checkpointing", False) else again,
        checkpointing=again,
        checkpoint=partial(adapters.checkpoint_activations, policy.model),
        emit=emit,
        keep=keep,
    )
    record = read_json(run.path / RECORD) if training.resume and (run.path / RECORD).is_file() else None
    if (record := world.told_by_first(record)) is not None:
        budget.restore(record)
    else:
        keep(budget.state())
    return budget


def _plan(recipe: Recipe, policy: Policy, longest_path: int, checkpointing: int, emit: Emitter) -> MemoryPlan | None:
    config: dict[str, Any] = policy.config.to_dict()
    device = policy.device.type
    try:
        return plan_memory(
            config,
            adapter=recipe.adapter,
            optim=recipe.train.optim,
            optim_args=recipe.train.optim_args,
            weights=number(policy.precision.weights),
            compute=number(policy.precision.compute),
            quantize=recipe.quantize,
            gradient_checkpointing=checkpointing,
            longest_path=longest_path,
            most_tokens=MOST_TOKENS.get(device, MOST_TOKENS["cpu"]),
            fused=fused_parts(policy),
            device=device,
            scored=policy.gives_scores,
            new_tokens=adapters.token_rows(policy.model),
            valued=recipe.objective.kind == "ppo",
            answering=answering(recipe),
        )
    except ModelError as error:
        emit.note(f"no memory plan: {error}; the token budget starts at its usual size and is corrected by measuring")
        return None


def fused_parts(policy: Policy) -> set[Part]:
    """The kinds of parts that are one operation each; Liger's kernels are norms and gates."""
    names = {entry.split()[-1] for entry in policy.fused}
    if "liger" in names:
        names |= {"norm", "gate"}
    if policy.device.type == "cpu" and kernels() is not None:
        names.add("softmax")
    return {part for part in PARTS if part in names}


def number(dtype: torch.dtype) -> Number:
    match dtype:
        case torch.bfloat16:
            return "bfloat16"
        case torch.float16:
            return "float16"
        case _:
            return "float32"
