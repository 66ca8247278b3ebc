"""Bases in four and eight bits: what is computed, with gradients, is what the bits stand for; PEFT's adapters train on them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from families import quantised_model, tiny_model
from tunedock.data.sample import Sample, single
from tunedock.errors import DependencyError
from tunedock.model.adapter import attach, parameter_counts
from tunedock.model.policy import Policy, Precision
from tunedock.model.quantize import bits_and_bytes, quantised
from tunedock.recipe.adapters import Lora

BFLOAT16 = torch.bfloat16


def samples() -> list[Sample]:
    import numpy as np

    draw = np.random.default_rng(3)
    return [single(f"s{n}", draw.integers(1, 90, n), np.ones(n, np.float32)) for n in (9, 30, 17)]


def adapted(model: nn.Module) -> Policy:
    model = attach(model, Lora(r=4, alpha=8), seed=1)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    policy = Policy(model, torch.device("cpu"), Precision(BFLOAT16, BFLOAT16))
    assert policy.probe() == []  # in eval mode, in which bitsandbytes may repack what it holds
    policy.model.train()
    return policy


def gradients(policy: Policy) -> dict[str, torch.Tensor]:
    for row in policy.rows(samples(), 128):
        logprobs_N, tensors = policy.logprobs(row)
        (-(tensors.weight_N * logprobs_N).sum()).backward()
    return {name: p.grad for name, p in policy.trainable if p.grad is not None}


def widened(model: nn.Module) -> nn.Module:
    """A plain model with the weights that the bits stand for."""
    import bitsandbytes as bnb

    plain = tiny_model("qwen3").to(BFLOAT16)
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            weight = module.weight.data.float() * module.weight.SCB[:, None] / 127
        else:
            continue
        plain.get_submodule(name).weight.data = weight.to(BFLOAT16)
    return plain


@pytest.mark.parametrize(("kind", "away"), [("nf4", 0.02), ("int8", 0.1)])
def test_gradients_are_those_of_the_widened_model(tmp_path: Path, kind: str, away: float) -> None:
    """int8's products round the other factor too."""
    base = quantised_model(tmp_path, "qwen3", kind)
    plain = adapted(widened(base))
    narrow = adapted(base)
    wanted, got = gradients(plain), gradients(narrow)
    assert got.keys() == wanted.keys() and len(got) == len(narrow.trainable)
    total = sum(float((value.float() ** 2).sum()) for value in wanted.values())
    differ = sum(float(((got[name] - value).float() ** 2).sum()) for name, value in wanted.items())
    assert (differ / total) ** 0.5 < away
    assert all(float(value.abs().max()) > 0 for name, value in got.items())


@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
def test_numbers_are_counted_not_bytes(tmp_path: Path, kind: str) -> None:
    whole = parameter_counts(tiny_model("qwen3"))["parameters"]
    model = quantised_model(tmp_path, "qwen3", kind)
    assert parameter_counts(model)["parameters"] == whole
    layers = quantised(model)
    assert layers is not None and layers.layers == 14
    assert quantised(attach(model, Lora(r=4, alpha=8), seed=0)) == layers


def test_without_bitsandbytes_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DependencyError, match="bitsandbytes") as raised:
        bits_and_bytes("nf4", BFLOAT16)
    assert "tunedock[quantize]" in str(raised.value.hint)
