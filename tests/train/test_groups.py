"""Groups of an optimizer: what is decayed, and LoRA+ as PEFT makes it."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from families import tiny_model
from tunedock.model.adapter import attach
from tunedock.recipe.adapters import Lora
from tunedock.recipe.schema import Train
from tunedock.train.groups import parameter_groups
from tunedock.train.optimizer import make_optimizer


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def test_what_is_decayed_is_what_has_two_dimensions() -> None:
    named = trainable(attach(tiny_model("qwen3"), Lora(r=2, alpha=4, use_dora=True, modules_to_save=["norm"]), seed=0))
    groups = parameter_groups(named, learning_rate=0.1, weight_decay=0.01)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.1, 0.01), (0.1, 0.0)]
    assert all(p.ndim == 2 for p in groups[0]["params"]) and all(p.ndim == 1 for p in groups[1]["params"])
    assert sum(len(group["params"]) for group in groups) == len(named)


def test_loraplus_steps_as_pefts_own() -> None:
    config = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(0)
    theirs = get_peft_model(tiny_model("qwen3"), config)
    ours = attach(tiny_model("qwen3"), Lora(r=2, alpha=4), seed=0)
    train = Train(learning_rate=1e-2, weight_decay=0.1)
    optimizers = (
        create_loraplus_optimizer(
            theirs, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.1
        ),
        make_optimizer(trainable(ours), train, loraplus_lr_ratio=16.0),
    )
    for model, optimizer in zip((theirs, ours), optimizers, strict=True):
        for _ in range(3):
            optimizer.zero_grad()
            for name, parameter in trainable(model):
                parameter.grad = torch.full_like(parameter, float(len(name) % 7 - 3)) + parameter.detach()
            optimizer.step()
    expected = dict(trainable(theirs))
    for name, parameter in trainable(ours):
        torch.testing.assert_close(parameter, expected[name], rtol=1e-6, atol=1e-7)
    assert {group["lr"] for group in optimizers[1].param_groups} == {1e-2, 0.16}
