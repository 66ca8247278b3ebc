"""The DeepSpeed configuration of a recipe: made here, or the user's file with what the recipe decides put in.

DeepSpeed is told to leave to us what a step is: `managed_gradient_accumulation` off (a step has as many rows as it has), no
optimizer and no schedule of its own, and no mixed precision: trained weights are float32, and products are made in the type of the
recipe by autocast, as without DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from tunedock.recipe.deepspeed import SAID_BY_THE_RECIPE

Offload = Literal["none", "optimizer", "all"]

OURS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "managed_gradient_accumulation",
)
"""Values of a user's file in whose place the recipe's stand."""


def deepspeed_config(
    stage: int, *, ranks: int, offload: Offload, max_grad_norm: float, given: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """`given`: what a user's file holds, looked through by `recipe.deepspeed`."""
    config = {
        name: value for name, value in (given or {}).items() if name not in SAID_BY_THE_RECIPE and name not in OURS
    }
    zero = dict(config.get("zero_optimization", {}))
    # The norm is always looked at: by it a step whose gradients are no numbers is known.
    zero = {name: value for name, value in zero.items() if value != "auto" and name != "compute_grad_norm"}
    zero["stage"] = stage
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
