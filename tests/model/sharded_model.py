"""The model and the step that `test_sharded.py` computes whole and `sharded_rank.py` on two ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from test_exactness import FLOAT32, samples

from families import tiny_model
from tunedock.data.sample import Sample
from tunedock.model.adapter import attach
from tunedock.model.policy import Policy
from tunedock.recipe.adapters import Full, Lora


def make(kind: str) -> Policy:
    """A probed policy in training mode, its adapter away from zero."""
    model = attach(tiny_model("qwen3"), Lora(r=4, alpha=8) if kind == "lora" else Full(), seed=1)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    policy = Policy(model, torch.device("cpu"), FLOAT32)
    policy.probe()
    policy.model.train()
    return policy


def group() -> Sequence[Sample]:
    return samples(100)


def count_of(samples_: Sequence[Sample]) -> float:
    return sum(sample.weight for sample in samples_)
