"""The DeepSpeed configuration: what is made, and what of a user's file is taken, overruled or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tunedock.recipe.deepspeed import Said, content_of, read_deepspeed
from tunedock.train.parallel.deepspeed_config import deepspeed_config


def made(stage: int = 2, **settings: Any) -> dict[str, Any]:
    return deepspeed_config(stage, **{"ranks": 4, "offload": "none", "max_grad_norm": 1.0, **settings})


def test_a_step_is_ours_to_say() -> None:
    assert made() == {
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": 2},
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": 1.0,
        "train_batch_size": 4,
    }


def test_offloading_goes_as_far_as_is_said_and_as_the_stage_allows() -> None:
    on_cpu = {"device": "cpu", "pin_memory": True}
    assert made(2, offload="optimizer")["zero_optimization"] == {"stage": 2, "offload_optimizer": on_cpu}
    assert made(3, offload="all")["zero_optimization"] == {
        "stage": 3,
        "offload_optimizer": on_cpu,
        "offload_param": on_cpu,
        "stage3_gather_16bit_weights_on_model_save": False,
    }


def test_a_users_file_adds_what_the_recipe_does_not_say(tmp_path: Path) -> None:
    """As those that LLaMA-Factory and transformers' documentation give."""
    file = tmp_path / "ds.json"
    given = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
        "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": 2,
            "overlap_comm": True,
            "reduce_bucket_size": 5e8,
            "round_robin_gradients": True,
        },
        "wall_clock_breakdown": False,
    }
    file.write_text(json.dumps(given))
    read = content_of(file)
    assert read_deepspeed(file) == Said("zero2", "none")
    config = made(given=read)
    assert config["zero_optimization"] == {**given["zero_optimization"]}
    assert config["wall_clock_breakdown"] is False
    unseen = {"zero_optimization": {"stage": 2, "compute_grad_norm": False}}
    assert made(given=unseen)["zero_optimization"] == {"stage": 2}, "what is no number would not be seen"
    assert config["train_batch_size"] == 4 and config["gradient_clipping"] == 1.0
    assert "bf16" not in config and "fp16" not in config
