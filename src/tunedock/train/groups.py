"""Trained parameters as an optimizer's groups: which are decayed, and at what rate each is trained.

LoRA+ trains B at a multiple of A's learning rate, since the two need steps of different size as a model grows wider. Source: arXiv
2402.12354.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn


def parameter_groups(
    named: Sequence[tuple[str, nn.Parameter]],
    *,
    learning_rate: float,
    weight_decay: float,
    loraplus_lr_ratio: float | None = None,
) -> list[dict[str, Any]]:
    """Groups in PyTorch's form; the first is at `learning_rate`, as are all without LoRA+. None is empty.

    Weight decay spares parameters of one dimension: biases, norms, DoRA's lengths.
    """
    found: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in named:
        faster = loraplus_lr_ratio is not None and is_b(name)
        found.setdefault((faster, parameter.ndim > 1), []).append(parameter)
    return [
        {
            "params": found[faster, decayed],
            "lr": learning_rate * (loraplus_lr_ratio or 1.0) if faster else learning_rate,
            "weight_decay": weight_decay if decayed else 0.0,
        }
        for faster in (False, True)
        for decayed in (True, False)
        if (faster, decayed) in found
    ]


def is_b(name: str) -> bool:
    """Whether a parameter is the second factor of a pair."""
    return ".lora_B." in name or ".lora_embedding_B." in name
