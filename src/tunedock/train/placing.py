"""A policy as a run trains it: loaded, put on its device or spread over several, probed, with its reference beside it."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunedock.data.sample import Sample
from tunedock.events import Emitter
from tunedock.model import world
from tunedock.model.adapter import parameter_counts
from tunedock.model.policy import Policy
from tunedock.model.reference import Reference, starts_at_zero
from tunedock.model.session import Base, trainable_policy
from tunedock.objective.registry import make as make_objective
from tunedock.recipe.adapters import Lora
from tunedock.recipe.objectives.preference import Dpo
from tunedock.recipe.schema import Recipe
from tunedock.train.announce import tell_model
from tunedock.train.beginning import beginning, keep_beginning
from tunedock.train.budget import Budget
from tunedock.train.checkpoint import Snapshot
from tunedock.train.feed import Feed, StoreFeed
from tunedock.train.optimizer import Updater, make_updater
from tunedock.train.parallel.replicated import require_same_weights
from tunedock.train.parallel.spread import Way, shard_weights, shards_weights, spread_updater, way_of
from tunedock.train.progress import Course
from tunedock.train.training import Training


@dataclass(slots=True)
class Placed:
    policy: Policy
    way: Way
    """How it is spread over the ranks."""
    reference: Reference | None
    counts: Mapping[str, Any]
    """Parameters, and those that are trained."""
    updater: Updater | None
    """Where it had to be made before the policy was called: of sharded weights."""


def place(training: Training, base: Base, course: Course, *, longest_path: int) -> Placed:
    """Seeds every generator with the recipe's seed on the way. A collective call."""
    recipe = training.recipe
    way = way_of(recipe, base, longest_path=longest_path)
    policy = trainable_policy(base, began=_began(training), spread=shards_weights(way))
    world.wait_for_all()  # one machine's disk may be far slower than another's
    if way == "ddp":
        require_same_weights(policy.model)
    if training.rank.leads:
        keep_beginning(training.run, base, policy.model, resume=training.resume)
    counts = parameter_counts(policy.model)
    at_zero = world.told_by_first(starts_at_zero(policy) if training.rank.leads else None)
    tell_model(base, policy, training.emit)
    _seed(recipe.train.seed)
    updater: Updater | None = None
    if shards_weights(way):  # then what is called from here on is the sharded model
        if recipe.objective.kind == "ppo":
            policy.add_value_head()
        shard_weights(policy, way, recipe)
        updater = _updater(recipe, policy, course, way)
    for given_up in policy.probe():
        training.emit.warning(given_up, where=str(base.located.folder))
    section = training.rollout
    needed = make_objective(recipe.objective).needs_reference if section is None else section.needs_reference
    reference = Reference.of(policy, at_zero=at_zero) if needed else None
    return Placed(policy, way, reference, counts, updater)


def _began(training: Training) -> dict[str, Tensor] | None:
    """What a resumed run began with, by the first rank's file: another machine may not see it. A collective call."""
    found = beginning(training.run) if training.resume and training.rank.leads else None
    if not world.told_by_first(found is not None):
        return None
    return dict(world.tensors_of_first(found or {}))


def complete(placed: Placed, recipe: Recipe, course: Course) -> Updater:
    """The value head, where the objective has one, and the updater, where they are not made yet."""
    if recipe.objective.kind == "ppo" and (placed.updater is None or placed.policy.head != "chosen"):
        placed.policy.add_value_head()
    if placed.updater is None:
        placed.updater = _updater(recipe, placed.policy, course, placed.way)
    return placed.updater


def _seed(seed: int) -> None:
    """A package may draw from any of the three; a checkpoint keeps their states."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def _updater(recipe: Recipe, policy: Policy, course: Course, way: Way) -> Updater:
    plain = make_updater(
        policy.trainable,
        recipe.train,
        total_steps=course.total_steps,
        device=policy.device,
        model=policy.model,
        loraplus_lr_ratio=recipe.adapter.loraplus_lr_ratio if isinstance(recipe.adapter, Lora) else None,
    )
    return spread_updater(plain, policy, way, recipe)


def ask_reference(
    reference: Reference,
    recipe: Recipe,
    policy: Policy,
    feed: Feed,
    validation: Sequence[Sample],
    budget: Budget,
    snapshot: Snapshot | None,
    emit: Emitter,
) -> None:
    """While the policy is as it began: takes over what a checkpoint remembers, asks about all rows if the recipe says so."""
    if snapshot is not None:
        reference.restore(snapshot.reference)
    kept = f"a copy of what is trained, {reference.kept_bytes / 2**20:,.1f} MiB" if reference.kept_bytes else ""
    if isinstance(recipe.objective, Dpo) and recipe.objective.precompute_ref_log_probs and isinstance(feed, StoreFeed):
        layout = partial(policy.rows, budget_tokens=budget.record[-1].tokens)
        for name, samples in (("reference", feed.samples), ("reference, validation", validation)):
            tell = partial(emit.progress, name, total=len(samples), unit="samples")
            reference.precompute(samples, layout, on_progress=tell)
        reference.let_go()
        kept = "asked about all rows before the first step"
    emit.note(f"reference policy: {kept or 'the base, with the adapter switched off'}", kept_bytes=reference.kept_bytes)
