"""The DeepSpeed configuration of a recipe: made here, or the user's file with what the recipe decides put in.

DeepSpeed is told to leave to us what a step is: `managed_gradient_accumulation` off (a step has as many rows as it has), no
optimizer and no schedule of its own, and no mixed precision: trained weights are float32, and products are made in the type of the
recipe by autocast, as without DeepSpeed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from tunedock.errors import RecipeError

Offload = Literal["none", "optimizer", "all"]

DECIDED = {
    "optimizer": "train.optim",
    "scheduler": "train.lr_scheduler_type",
    "fp16": "train.fp16",
    "bf16": "train.bf16",
    "amp": "train.bf16",
    "torch_autocast": "train.bf16",
    "data_efficiency": "data",
    "curriculum_learning": "data",
    "activation_checkpointing": "train.gradient_checkpointing",
}
"""Sections of a user's file -> the recipe's key that decides it."""

OURS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "managed_gradient_accumulation",
)
"""Values of a user's file that the recipe says; `auto` or the recipe's own are taken, as transformers takes them."""


def deepspeed_config(
    stage: int, *, ranks: int, offload: Offload, max_grad_norm: float, given: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """`given`: what a user's file holds (`read_deepspeed`)."""
    config = {name: value for name, value in (given or {}).items() if name not in DECIDED and name not in OURS}
    zero = dict(config.get("zero_optimization", {}))
    zero = {name: value for name, value in zero.items() if value != "auto"} | {"stage": stage}
    if offload != "none":
        zero.setdefault("offload_optimizer", {"device": "cpu", "pin_memory": True})
    if offload == "all" and stage == 3:
        zero.setdefault("offload_param", {"device": "cpu", "pin_memory": True})
    if stage == 3:
        zero.setdefault("stage3_gather_16bit_weights_on_model_save", False)
    return {
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **config,
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": max_grad_norm,
        "train_batch_size": ranks,
    }


def read_deepspeed(path: Path) -> dict[str, Any]:
    """A user's file. Raises RecipeError where it cannot be read, or says what the recipe decides."""
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"the DeepSpeed file cannot be read: {error}", where=f"train.deepspeed: {path}") from None
    if not isinstance(given, dict):
        raise RecipeError("the DeepSpeed file holds no object", where=f"train.deepspeed: {path}")
    for name, key in DECIDED.items():
        if (found := given.get(name)) is not None and not _left_open(found):
            raise RecipeError(
                f"`{name}` of the DeepSpeed file is decided by the recipe",
                where=f"train.deepspeed: {path}",
                hint=f"say it as `{key}`, and leave it out of the file (or write `auto`)",
            )
    return given


def stage_of(given: Mapping[str, Any], path: Path) -> int:
    """The ZeRO stage a user's file asks for. Raises RecipeError for none."""
    zero = given.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, Mapping) else None
    if stage not in (0, 1, 2, 3):
        raise RecipeError(f"`zero_optimization.stage` is {stage!r}, not 0, 1, 2 or 3", where=f"train.deepspeed: {path}")
    return int(stage)


def _left_open(value: Any) -> bool:
    """Whether a section says nothing: not whether it is on, or all that it says is `auto`."""
    if isinstance(value, Mapping):
        if "enabled" in value:
            return value["enabled"] in (False, "auto")
        return all(_left_open(child) for child in value.values())
    return bool(value == "auto")
