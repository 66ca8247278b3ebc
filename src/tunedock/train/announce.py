"""What a run tells before its first step: what it found, what it will do and how long that may take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from tunedock.events import Emitter
from tunedock.model.policy import Policy
from tunedock.model.quantize import quantised
from tunedock.model.session import Base
from tunedock.plan.memory import readable
from tunedock.recipe.objectives.rollout import Rollout
from tunedock.train.data_record import DataRecord
from tunedock.train.estimate import estimate_seconds
from tunedock.train.progress import Course
from tunedock.train.training import Training


def tell_model(base: Base, policy: Policy, emit: Emitter) -> None:
    """New tokens and weights of few bits."""
    made = base.new_tokens
    if made.known:
        emit.note(f"tokens the model has already, so that none is made: {', '.join(map(repr, made.known))}")
    if made.ids:
        rows = int(policy.config.get_text_config().vocab_size)
        emit.note(
            f"{len(made.ids)} new tokens, ids {made.ids[0]} to {made.ids[-1]}, in a vocabulary of {rows:,}; rows it lacked are "
            "drawn around the mean of the others",
            ids=list(made.ids),
            vocabulary=rows,
        )
    if (narrow := quantised(policy.model)) is not None:
        how = "products are made in it" if narrow.products else "widened for each product: less memory, not less time"
        emit.note(
            f"base in {base.recipe.quantize}: {narrow.layers} linear layers, {readable(narrow.size_bytes)}; {how}",
            **asdict(narrow),
        )


def warn_of_engines(base: Base, record: DataRecord, emit: Emitter) -> None:
    """Where other engines would not render the prompts this model is trained on."""
    generates = base.head == "logprobs" and not base.chat.documents
    if generates and not base.chat.engine_renders(thinking=record.thinking):
        emit.warning(
            "no outside engine renders the prompts this model is trained on: its template cannot be told to leave the thinking out",
            where="chat template",
            hint="`tunedock chat` and `tunedock eval` render them; for other engines, train on answers with reasoning",
        )


def announce(
    training: Training,
    policy: Policy,
    course: Course,
    record: DataRecord,
    counts: Mapping[str, Any],
    *,
    budget_tokens: int,
) -> None:
    """Steps, tokens and an estimate of the time; of answers that are yet to be made, how many tokens at most."""
    section = training.rollout
    parts, figures = (
        _of_data(training, policy, course, record) if section is None else _of_answers(section, course, record)
    )
    parts.append(f"{counts['trained']:,} of {counts['parameters']:,} parameters trained")
    parts.append(f"{policy.device.type} {str(policy.precision.compute).removeprefix('torch.')}")
    training.emit.note(
        "; ".join(parts),
        steps=course.total_steps,
        steps_per_epoch=course.steps_per_epoch,
        **figures,
        token_budget=budget_tokens,
        layout=policy.layout,
        head=policy.head,
        **counts,
    )


def _of_data(
    training: Training, policy: Policy, course: Course, record: DataRecord
) -> tuple[list[str], dict[str, float]]:
    tokens = round(course.examples * record.mean_tokens)
    trained = round(course.examples * record.mean_trained)
    seconds = estimate_seconds(policy, tokens, trained, full=training.recipe.adapter.kind != "lora")
    parts = [f"{course.total_steps} steps"]
    if course.steps_per_epoch:
        parts[0] += f" ({course.steps_per_epoch} an epoch)"
    parts.append(f"batch {training.batch_size}")
    parts += [f"about {tokens:,} tokens", f"about {_duration(seconds)} (corrected as steps run)"]
    return parts, {"tokens": tokens, "estimated_seconds": seconds}


def _of_answers(section: Rollout, course: Course, record: DataRecord) -> tuple[list[str], dict[str, float]]:
    rollouts = math.ceil(course.total_steps / (section.steps_per_generation * section.times))
    answers = course.examples // section.times
    most = round(answers * (record.mean_tokens / section.num_generations + section.max_new_tokens))
    parts = [
        f"{course.total_steps} steps ({course.steps_per_epoch} an epoch) in {rollouts} rollouts",
        f"{answers:,} answers, {section.num_generations} to a prompt, of {section.max_new_tokens} tokens at most",
    ]
    return parts, {"tokens": most}


def _duration(seconds: float) -> str:
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
