"""What a run will take, before a weight is loaded: steps, memory by part and by device, whether it fits, what would make it fit.

Spreading over devices follows ZeRO: stage 1 divides the optimizer's states, 2 the gradients too, 3 the weights too, of which one
layer at a time stands whole on each device. Source: arXiv 1910.02054.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tunedock.plan.cards import Target
from tunedock.plan.decoder import HEADS, Decoder, decoder
from tunedock.plan.memory import MemoryPlan, Part, answering_bytes, held_as, numbers, plan_memory
from tunedock.plan.rollout_memory import answering, reference_bytes
from tunedock.plan.rungs import HEADROOM, LADDER, MOST_TOKENS, at_most
from tunedock.plan.shapes import Shape
from tunedock.plan.speed import CHECKPOINTING, EFFICIENCY, operations
from tunedock.plan.spread import STAGES, WHOLE, Spread, divided
from tunedock.plan.steps import StepPlan, floor_steps, plan_steps, rollouts_of
from tunedock.plan.trained import trained_size, value_head_size
from tunedock.recipe.adapters import Lora
from tunedock.recipe.objectives.rollout import Rollout
from tunedock.recipe.rules_parallel import why_not_by
from tunedock.recipe.schema import Recipe

WEIGHT_BITS: Mapping[str, int] = {"fp32": 32, "fp16": 16, "bf16": 16, "int8": 8, "int4": 4, "int2": 2}

CARD_SHARE = 0.95
"""Of a card's memory; the rest is the driver's and the display's."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a recipe, and the samples they make on each side (a pair read as two verdicts makes two)."""

    read: int
    train: int
    validation: int
    test: int
    mean_tokens: float | None = None
    """Of a training sample; estimated from its characters."""
    mean_trained: float | None = None


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes on one device."""

    parts: Mapping[str, int]
    bytes_per_token: int
    host_bytes: int = 0
    answering: Mapping[str, int] = field(default_factory=dict)
    """What is held while answers are made, when there are no gradients and no activations."""

    def step(self, tokens: int) -> int:
        """At the peak of a step whose largest row has `tokens`."""
        return sum(self.parts.values()) + self.bytes_per_token * tokens

    @property
    def answering_bytes(self) -> int:
        return answering_bytes(self.parts, self.answering)

    def at(self, tokens: int) -> int:
        """At the peak of the run."""
        return max(self.step(tokens), self.answering_bytes)


@dataclass(frozen=True, slots=True)
class Way:
    """A change that needs less."""

    change: str
    """As on the command line."""
    needed_bytes: int
    fits: bool
    cost: str


@dataclass(frozen=True, slots=True)
class Outlook:
    target: Target
    parameters: int
    trained: int
    known_family: bool
    shape_source: str
    need: Need
    room_bytes: int
    """What may be used of a device."""
    longest: int
    """Tokens of the longest sample, which is the smallest a row can be planned for."""
    row_tokens: int | None
    """The largest row that fits; None when not even the longest sample does."""
    weights: Mapping[str, int]
    """Bytes of all weights, by how a number is held."""
    batch_size: int
    spread: Spread = WHOLE
    rows: Rows | None = None
    steps: StepPlan | None = None
    floor: StepPlan | None = None
    seconds: float | None = None
    ways: Sequence[Way] = field(default_factory=tuple)

    @property
    def fits(self) -> bool:
        return self.row_tokens is not None


def outlook(
    recipe: Recipe,
    shape: Shape,
    target: Target,
    *,
    rows: Rows | None = None,
    spread: Spread | None = None,
    batch_size: int | None = None,
) -> Outlook:
    """`spread`, `batch_size` (examples of a step over all devices): the recipe's by default.

    Raises ModelError for a config that says too little.
    """
    model = decoder(shape.config, scored=recipe.objective.kind == "reward")
    added = recipe.model.new_tokens
    room = _room(target)
    longest = min(recipe.data.max_length, recipe.train.token_budget or recipe.data.max_length)
    parallel = _parallel(recipe, shape, model, target)
    spread = Spread.by(parallel, recipe.offload) if spread is None else spread
    need = _need(recipe, shape, model, target, spread)
    batch = batch_size or recipe.train.batch_size or 1
    steps = floor = None
    if rows is not None and rows.train > 0 and isinstance(recipe.objective, Rollout):
        rounds = rollouts_of(recipe, recipe.objective, rows.train)
        prompts = rounds.rollouts * rounds.prompts
        steps = StepPlan(rounds.steps_per_epoch, rounds.total_steps, prompts, prompts / rows.train)
    elif rows is not None and rows.train > 0:
        steps = plan_steps(rows.train, batch, recipe.train.num_train_epochs, recipe.train.max_steps)
        floor = floor_steps(rows.train, batch, recipe.train.num_train_epochs, recipe.train.max_steps)
    row = _largest_row(recipe, need, room, longest, target)
    return Outlook(
        target=target,
        parameters=model.size,
        trained=trained_size(model, recipe.adapter, new_tokens=added, grows=added)
        + (value_head_size(model) if recipe.objective.kind == "ppo" else 0),
        known_family=model.known,
        shape_source=shape.source,
        need=need,
        room_bytes=room,
        longest=longest,
        row_tokens=row,
        weights={name: model.size * bits // 8 for name, bits in WEIGHT_BITS.items()},
        batch_size=batch,
        spread=spread,
        rows=rows,
        steps=steps,
        floor=floor,
        seconds=_seconds(recipe, model, target, rows, steps),
        ways=() if row is not None else tuple(_ways(recipe, shape, model, target, spread, longest)),
    )


def _parallel(recipe: Recipe, shape: Shape, model: Decoder, target: Target) -> str:
    """The recipe's, `auto` settled as a run does: whole models where they fit, else shares of one."""
    if recipe.parallel != "auto":
        return recipe.parallel
    longest = min(recipe.data.max_length, recipe.train.token_budget or recipe.data.max_length)
    whole = _need(recipe, shape, model, target, WHOLE).at(longest) <= _room(target)
    return "ddp" if whole or target.devices == 1 or why_not_by(recipe, "fsdp") is not None else "fsdp"


def _plan(recipe: Recipe, shape: Shape, target: Target) -> MemoryPlan:
    weights, compute = numbers(recipe, bf16=target.bf16)
    return plan_memory(
        shape.config,
        adapter=recipe.adapter,
        optim=recipe.train.optim,
        optim_args=recipe.train.optim_args,
        weights=weights,
        compute=compute,
        quantize=recipe.quantize,
        gradient_checkpointing=recipe.train.gradient_checkpointing,
        longest_path=recipe.data.max_length,
        most_tokens=MOST_TOKENS[target.kind],
        fused=_fused(recipe, shape, target),
        device=target.kind,
        scored=recipe.objective.kind == "reward",
        new_tokens=recipe.model.new_tokens,
        grows=recipe.model.new_tokens,
        reference=reference_bytes(recipe, shape.config),
        valued=recipe.objective.kind == "ppo",
        answering=answering(recipe),
    )


def _fused(recipe: Recipe, shape: Shape, target: Target) -> set[Part]:
    """What will be one operation: on a CPU with a compiler; LoRA on plain linear layers, gates that are two of them."""
    if target.kind != "cpu":
        return set()
    parts: set[Part] = {"norm", "gate", "lora", "softmax"}
    if recipe.train.torch_compile is True:
        parts = {"softmax"}
    plain = isinstance(recipe.adapter, Lora) and not recipe.adapter.use_dora
    if not plain or held_as(shape.config, recipe.quantize) != "none":
        parts.discard("lora")
    if decoder(shape.config).gate_fused:
        parts.discard("gate")
    return parts


def _need(recipe: Recipe, shape: Shape, model: Decoder, target: Target, spread: Spread) -> Need:
    plan = _plan(recipe, shape, target)
    held, host = divided(plan, spread, devices=target.devices, layers=model.layers)
    return Need(held.parts, held.bytes_per_token, host, held.answering)


def _room(target: Target) -> int:
    return int(target.memory_bytes * (CARD_SHARE if target.kind == "cuda" else HEADROOM))


def _largest_row(recipe: Recipe, need: Need, room: int, longest: int, target: Target) -> int | None:
    if need.at(longest) > room:
        return None
    if recipe.train.token_budget is not None:
        return recipe.train.token_budget
    most = max(at_most(MOST_TOKENS[target.kind]), longest)
    return max((rung for rung in LADDER if rung <= most and need.at(rung) <= room and rung >= longest), default=longest)


def _seconds(recipe: Recipe, model: Decoder, target: Target, rows: Rows | None, steps: StepPlan | None) -> float | None:
    """Operations over what the devices do; None where a figure is missing, or answers of unknown length are made."""
    if isinstance(recipe.objective, Rollout):
        return None
    if rows is None or steps is None or rows.mean_tokens is None or target.teraflops is None:
        return None
    head = model.hidden * (1 if model.scored else model.vocabulary)
    body = sum(linear.size for linear in model.linears if linear.name not in HEADS)
    tokens = rows.mean_tokens * (CHECKPOINTING if recipe.train.gradient_checkpointing else 1.0)
    trained = rows.mean_trained if rows.mean_trained is not None else rows.mean_tokens
    each = operations(body, head, tokens, trained, full=recipe.adapter.kind != "lora")
    return each * steps.examples_seen / (target.teraflops * 1e12 * EFFICIENCY[target.kind] * target.devices)


def _ways(recipe: Recipe, shape: Shape, model: Decoder, target: Target, spread: Spread, longest: int) -> Iterator[Way]:
    """Each change alone, then all that keep the method together; those that need no less are left out."""
    before = _need(recipe, shape, model, target, spread).at(longest)
    together: dict[str, Any] = {}
    for keys, cost in [*_fewer_answers(recipe, shape, model, target, spread), *_changes(recipe, target)]:
        changed = _with(recipe, keys)
        after = _need(changed, shape, model, target, spread).at(min(longest, changed.data.max_length))
        if after < before and why_not_by(changed, recipe.parallel) is None:
            yield Way(_said(keys), after, after <= _room(target), cost)
            if "adapter" not in keys and "data.max_length" not in keys:
                together |= keys
    keys = {"adapter": "lora", "quantize": "nf4"}
    whole = recipe.adapter.kind != "lora" and recipe.quantize == "none"
    if whole and why_not_by(_with(recipe, keys), recipe.parallel) is None:
        after = _need(_with(recipe, keys), shape, model, target, spread).at(longest)
        yield Way(_said(keys), after, after <= _room(target), "QLoRA: the base in four bits; needs bitsandbytes")
    for keys, cost in _spreads(recipe, target, spread):
        parallel, offload = keys.get("parallel", recipe.parallel), keys.get("offload", recipe.offload)
        after = _need(recipe, shape, model, target, Spread.by(parallel, offload)).at(longest)
        if after < before:
            yield Way(_said(keys), after, after <= _room(target), cost)
    if len(together) > 1:
        changed = _with(recipe, together)
        after = _need(changed, shape, model, target, spread).at(longest)
        yield Way(_said(together), after, after <= _room(target), "these together")


def _fewer_answers(
    recipe: Recipe, shape: Shape, model: Decoder, target: Target, spread: Spread
) -> Iterator[tuple[dict[str, Any], str]]:
    """As many answers made at once as fit, by halves; one where not even that does."""
    how = answering(recipe)
    if how is None:
        return
    at_once = how.at_once
    while at_once > 1:
        at_once //= 2
        keys = {how.key: at_once}
        if at_once == 1 or _need(_with(recipe, keys), shape, model, target, spread).answering_bytes <= _room(target):
            yield keys, "answers are made in more batches, which is slower"
            return


def _changes(recipe: Recipe, target: Target) -> Iterator[tuple[dict[str, Any], str]]:
    if recipe.objective.kind == "dpo" and not recipe.objective.precompute_ref_log_probs:
        yield {"objective.precompute_ref_log_probs": True}, "the reference is asked about all rows first, and let go"
    if recipe.train.gradient_checkpointing is not True:
        yield {"train.gradient_checkpointing": True}, "a third more time: each layer is computed twice"
    if recipe.adapter.kind != "lora":
        yield {"adapter": "lora"}, "a few thousandths of the weights are trained; most tasks learn as well"
        if not recipe.train.optim.endswith("8bit") and target.kind == "cuda":
            yield {"train.optim": "adamw_8bit"}, "optimizer states of one byte; needs bitsandbytes"
    elif recipe.quantize == "none":
        yield {"quantize": "fp8"}, "the base's linear layers are rounded to three bits of mantissa"
        yield {"quantize": "nf4"}, "QLoRA: the base in four bits, somewhat slower; needs bitsandbytes"
    half = recipe.data.max_length // 2
    if half >= 256:
        yield {"data.max_length": half}, "longer samples are dropped, or cut with `data.over_length: truncate`"


def _spreads(recipe: Recipe, target: Target, spread: Spread) -> Iterator[tuple[dict[str, Any], str]]:
    if target.devices > 1:
        for parallel in ("zero1", "zero2", "fsdp"):
            stage = STAGES[parallel]
            if stage > spread.zero and why_not_by(recipe, parallel) is None:
                told = ("optimizer states", "gradients", "weights")[stage - 1]
                yield {"parallel": parallel}, f"{told} are divided over the devices; more to send between them"
    way = f"zero{spread.zero or 1}"
    if (
        not spread.offload
        and recipe.adapter.kind != "lora"
        and target.kind == "cuda"
        and why_not_by(recipe, way) is None
    ):
        yield {"parallel": way, "offload": "optimizer"}, "optimizer states in main memory; each step waits for it"


def _with(recipe: Recipe, keys: Mapping[str, Any]) -> Recipe:
    values = recipe.model_dump()
    for key, value in keys.items():
        *sections, name = key.split(".")
        place = values
        for section in sections:
            place = place[section]
        place[name] = value
    return Recipe.model_validate(values)


def _said(keys: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in keys.items())
