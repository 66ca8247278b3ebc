"""Measures what steps of real models hold at their peak, in a process of their own: an allocator used by other tests would reuse
what they left. Prints a JSON object: name of the case -> {"measured", "planned"} bytes above the loaded model.

    python measure_step.py CASE...
"""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM

from tunedock.data.sample import single
from tunedock.model.adapter import attach, checkpoint_activations
from tunedock.model.policy import Policy, Precision
from tunedock.plan.memory import plan_memory
from tunedock.recipe.adapters import Adapter, Full, Lora
from tunedock.train.memory import HostMemory
from tunedock.train.planning import fused_parts

LORA = Lora(r=16, alpha=32)
TOKENS, PATH, VOCABULARY = 2048, 256, 2000
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

CASES: dict[str, tuple[str, dict[str, Any], Adapter, str, str, bool]] = {
    "qwen3": ("Qwen3Config", {"head_dim": 64}, LORA, "float32", "float32", False),
    "qwen3-bf16": ("Qwen3Config", {"head_dim": 64}, LORA, "bfloat16", "bfloat16", False),
    "qwen3-checkpointing": ("Qwen3Config", {"head_dim": 64}, LORA, "float32", "float32", True),
    "qwen3-full": ("Qwen3Config", {"head_dim": 64}, Full(), "float32", "float32", False),
    "llama": ("LlamaConfig", {}, LORA, "float32", "float32", False),
    "gemma2": ("Gemma2Config", {"head_dim": 64}, LORA, "float32", "float32", False),
    "phi": ("PhiConfig", {}, LORA, "float32", "float32", False),
    "moe": (
        "Qwen3MoeConfig",
        {"head_dim": 64, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 512},
        Lora(r=16, alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
        "float32",
        "float32",
        False,
    ),
}


def measure(name: str) -> dict[str, int]:
    kind, changes, adapter, weights, compute, checkpointing = CASES[name]
    config = getattr(transformers, kind)(**SHAPE, **changes)
    model = attach(AutoModelForCausalLM.from_config(config, dtype=getattr(torch, weights)), adapter, seed=0)
    policy = Policy(model, torch.device("cpu"), Precision(getattr(torch, weights), getattr(torch, compute)))
    policy.probe()
    if checkpointing:
        checkpoint_activations(model)
    model.train()
    draw = np.random.default_rng(0)
    samples = [
        single(f"{n}", draw.integers(3, VOCABULARY, PATH), np.ones(PATH, np.float32)) for n in range(TOKENS // PATH)
    ]
    (row,) = policy.rows(samples, budget_tokens=TOKENS)
    ctypes.CDLL(None).malloc_trim(0)
    memory = HostMemory()
    before = memory.used_bytes()
    with memory.watched() as peak:
        policy.logprobs(row)[0].sum().backward()
    plan = plan_memory(
        config.to_dict(),
        adapter=adapter,
        optim="sgd",
        weights=weights,  # type: ignore[arg-type]
        compute=compute,  # type: ignore[arg-type]
        gradient_checkpointing=checkpointing,
        longest_path=PATH,
        most_tokens=TOKENS,
        fused=fused_parts(policy),
    )
    return {"measured": peak.size - before, "planned": plan.to_come_bytes + plan.bytes_per_token * TOKENS}


print(json.dumps({name: measure(name) for name in sys.argv[1:]}))
