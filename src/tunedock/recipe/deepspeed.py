"""A DeepSpeed JSON of the user's own -> what it says that a recipe says too: the stage, and what is kept in main memory.

The rest of the file goes to DeepSpeed as it is. `auto`, which transformers fills in from its arguments, is filled in likewise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunedock.errors import RecipeError

STAGES = ("ddp", "zero1", "zero2", "zero3")
"""`parallel` by DeepSpeed's stage."""

SAID_BY_THE_RECIPE = {
    "optimizer": "train.optim",
    "scheduler": "train.lr_scheduler_type",
    "fp16": "train.fp16",
    "bf16": "train.bf16",
    "amp": "train.bf16",
    "torch_autocast": "train.bf16",
    "activation_checkpointing": "train.gradient_checkpointing",
    "data_efficiency": "data",
    "curriculum_learning": "data",
}
"""Sections that would decide what the recipe decides, unless they leave it open."""

KEY = "train.deepspeed"


@dataclass(frozen=True, slots=True)
class Said:
    parallel: str
    offload: str


def read_deepspeed(path: Path) -> Said:
    """Raises RecipeError as `content_of` does, and for a stage there is none of."""
    return said_in(content_of(path), str(path))


def content_of(path: Path) -> Mapping[str, Any]:
    """What the file holds. Raises RecipeError where it cannot be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"`{KEY}` cannot be read as JSON: {error}", where=str(path)) from None
    if not isinstance(value, Mapping):
        raise RecipeError(f"`{KEY}` is a JSON file with a mapping of DeepSpeed's keys", where=str(path))
    return value


def said_in(value: Mapping[str, Any], where: str) -> Said:
    """The same of what the file holds. Raises RecipeError for sections whose place is the recipe."""
    for name, key in SAID_BY_THE_RECIPE.items():
        if name in value and not _left_open(value[name]):
            raise RecipeError(f"`{name}` is the recipe's to say", where=where, hint=f"take it out and set `{key}`")
    zero = value.get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, Mapping) else None
    if not isinstance(stage, int) or isinstance(stage, bool) or not 0 <= stage <= 3:
        raise RecipeError("`zero_optimization.stage` is 0, 1, 2 or 3", where=where)
    return Said(STAGES[stage], "all" if _to_host(zero, "offload_param") else _optimizer(zero))


def _left_open(value: Any) -> bool:
    """Whether a section says nothing: not whether it is on, or all that it says is `auto`."""
    if isinstance(value, Mapping):
        return value["enabled"] in (False, "auto") if "enabled" in value else all(map(_left_open, value.values()))
    return bool(value == "auto")


def _optimizer(zero: Mapping[str, Any]) -> str:
    return "optimizer" if _to_host(zero, "offload_optimizer") else "none"


def _to_host(zero: Mapping[str, Any], section: str) -> bool:
    given = zero.get(section)
    return isinstance(given, Mapping) and given.get("device", "cpu") != "none"


def fill_from_deepspeed(values: dict[str, Any], derived: dict[str, str], path: Path) -> None:
    """Puts what the file says where the recipe says nothing. Raises RecipeError where both do, and differ."""
    said = read_deepspeed(path)
    for key, default, found in (("parallel", "auto", said.parallel), ("offload", "none", said.offload)):
        if values[key] == default:
            values[key] = found
            derived[key] = KEY
        elif values[key] != found:
            raise RecipeError(
                f"`{key}: {values[key]}`, and the DeepSpeed file says `{found}`",
                where=str(path),
                hint=f"leave `{key}` out, or correct the file's `zero_optimization`",
            )
