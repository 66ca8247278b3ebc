"""The memory plan: exact where it can be, and within a stated factor of a real step's peak where it cannot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from families import quantised_model
from tunedock.model import head
from tunedock.model.quantize import quantised
from tunedock.plan.decoder import decoder
from tunedock.plan.memory import CHUNK_BYTES, TRUST, MemoryPlan, plan_memory, readable
from tunedock.recipe.adapters import Freeze, Full, Lora

QWEN3_8B = {
    "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
}  # fmt: skip
PARAMETERS = 8_190_735_360  # as the model card has it: 8.2B


def test_an_8b_model_under_lora() -> None:
    plan = plan_memory(QWEN3_8B, adapter=Lora(r=16), device="cuda")
    trained = 43_646_976
    assert decoder(QWEN3_8B).size == PARAMETERS
    assert plan.parts["base weights"] == 2 * PARAMETERS
    assert plan.parts["adapter weights"] == plan.parts["gradients"] == 4 * trained
    assert plan.parts["optimizer"] == 8 * trained
    assert 16e9 < plan.fixed_bytes < 20e9
    assert plan.needed(1000) == plan.fixed_bytes + 1000 * plan.bytes_per_token
    assert plan.to_come_bytes < 2 << 30


@pytest.mark.parametrize("kind", ["fp8", "int8", "nf4"])
@pytest.mark.parametrize("family", ["qwen3", "gemma", "phi3"])
def test_a_base_in_fewer_bits_is_as_large_as_planned(tmp_path: Path, family: str, kind: str) -> None:
    model = quantised_model(tmp_path, family, kind)
    linear = quantised(model)
    assert linear is not None
    narrow = {id(p) for p in model.parameters() if p.dtype in (torch.uint8, torch.int8)}
    others = {p.data_ptr(): p.nbytes for p in model.parameters() if id(p) not in narrow}
    plan = plan_memory(model.config.to_dict(), adapter=Lora(), quantize=kind)
    held = linear.size_bytes + sum(others.values())
    # Four bits are packed in blocks, the last of which may be part empty.
    assert plan.parts["base weights"] == pytest.approx(held, rel=0.005 if kind == "nf4" else 0)


def test_whole_weights_and_their_states_are_held_in_float32() -> None:
    plan = plan_memory(QWEN3_8B, adapter=Full(), optim="adamw_8bit", weights="float32", compute="bfloat16")
    assert plan.parts["base weights"] == plan.parts["gradients"] == 4 * PARAMETERS
    assert plan.parts["optimizer"] == plan.parts["compute copies"] == 2 * PARAMETERS
    assert plan.parts["adapter weights"] == 0


def test_freezing_costs_states_of_the_last_layers_only() -> None:
    few = plan_memory(QWEN3_8B, adapter=Freeze(last_n_layers=1), weights="float32")
    half = plan_memory(QWEN3_8B, adapter=Freeze(last_n_layers=18), weights="float32")
    assert half.parts["optimizer"] == 18 * few.parts["optimizer"] > 0


def test_what_makes_activations_smaller() -> None:
    def per_token(**changes: Any) -> int:
        return plan_memory(QWEN3_8B, **{"adapter": Lora(), **changes}).bytes_per_token

    assert per_token(gradient_checkpointing=True) * 8 < per_token()
    by_layers = [per_token(gradient_checkpointing=layers) for layers in (*range(37), 100)]
    assert by_layers[0] == per_token() and by_layers[36] == by_layers[37] == per_token(gradient_checkpointing=True)
    assert by_layers[1:37] == sorted(by_layers[1:37], reverse=True)
    assert per_token(compute="float32", weights="float32") > 1.3 * per_token()
    assert per_token(adapter=Lora(target_modules=["q_proj"])) < per_token()


def test_soft_capped_scores_grow_with_the_path() -> None:
    gemma = {**QWEN3_8B, "model_type": "gemma2", "attn_logit_softcapping": 50.0}
    short, long = (plan_memory(gemma, adapter=Lora(), longest_path=tokens) for tokens in (512, 4096))
    assert long.bytes_per_token > 2 * short.bytes_per_token
    assert (
        plan_memory(QWEN3_8B, adapter=Lora(), longest_path=512).bytes_per_token
        == plan_memory(QWEN3_8B, adapter=Lora(), longest_path=4096).bytes_per_token
    )


def test_optimizers_that_treat_matrices_apart() -> None:
    """Muon keeps one number for a hidden matrix's and two for the others'; GaLore two numbers of a low rank and a projection."""
    shape = decoder(QWEN3_8B)
    hidden = sum(linear.inputs * linear.outputs for linear in shape.linears if linear.name != "lm_head")
    whole = plan_memory(QWEN3_8B, adapter=Full())
    muon = plan_memory(QWEN3_8B, adapter=Full(), optim="muon")
    assert whole.parts["optimizer"] - muon.parts["optimizer"] == 4 * hidden
    low = plan_memory(QWEN3_8B, adapter=Full(), optim="galore_adamw", optim_args="rank=256")
    assert low.parts["optimizer"] < 0.3 * whole.parts["optimizer"]
    lora = plan_memory(QWEN3_8B, adapter=Lora(), optim="muon")
    assert lora.parts["optimizer"] == plan_memory(QWEN3_8B, adapter=Lora()).parts["optimizer"] // 2


def test_the_head_says_the_same() -> None:
    assert head.CHUNK_BYTES == CHUNK_BYTES


def test_bytes_for_people() -> None:
    assert [readable(size) for size in (-5, 1, 5 << 20, 3 << 29)] == ["0 MiB", "1 MiB", "5 MiB", "1.5 GiB"]


def test_parts_are_all_that_is_fixed() -> None:
    plan = MemoryPlan({"runtime": 1, "base weights": 10, "adapter weights": 100, "gradients": 1000}, 7, True)
    assert (plan.fixed_bytes, plan.to_come_bytes, plan.needed(2)) == (1111, 1000, 1125)


@pytest.mark.parametrize(
    "cases",
    [
        ["qwen3-bf16"],
        pytest.param(
            ["qwen3", "qwen3-checkpointing", "qwen3-full", "llama", "gemma2", "phi", "moe"], marks=pytest.mark.long
        ),
    ],
    ids=["quick", "all"],
)
@pytest.mark.skipif(
    sys.platform != "linux", reason="how much is kept of what is freed is the allocator's: glibc's here"
)
def test_a_real_step_holds_what_is_planned(cases: list[str]) -> None:
    script = Path(__file__).with_name("measure_step.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), *cases],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name, sizes in json.loads(done.stdout.splitlines()[-1]).items():
        ratio = sizes["measured"] / sizes["planned"]
        assert 1 / TRUST < ratio < TRUST, f"{name}: {ratio:.2f}"
