"""How long training will take, before its first step: operations needed over what the device does in a tenth of a second.

Operations a token: forward 2 and backward 4 a parameter when all weights are trained; with a frozen base the weights' own gradients
(2 of the 4) fall away. The head counts for trained tokens only. Real steps reach a part of a plain product's speed, `EFFICIENCY`;
the estimate is corrected as steps run.
"""

from __future__ import annotations

import time

import torch

from tunedock.model.policy import Policy
from tunedock.model.quantize import numbers_in

EFFICIENCY = 0.35
SIDE = 1024


def product_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a square matrix product."""
    a = torch.ones(SIDE, SIDE, dtype=dtype, device=device)
    torch.mm(a, a)
    _wait(device)
    started, products = time.perf_counter(), 0
    while time.perf_counter() - started < 0.1:
        torch.mm(a, a)
        products += 1
        _wait(device)
    return 2 * SIDE**3 * products / (time.perf_counter() - started)


def estimate_seconds(policy: Policy, tokens: int, trained_tokens: int, *, full: bool) -> float:
    """Seconds for a run over `tokens`, of which `trained_tokens` go through the head."""
    head = policy.model.get_output_embeddings().weight.numel()  # type: ignore[operator]
    embedding = policy.model.get_input_embeddings().weight.numel()  # type: ignore[operator]
    total = sum(numbers_in(parameter) for parameter in policy.model.parameters())
    tied = policy.model.get_output_embeddings().weight is policy.model.get_input_embeddings().weight  # type: ignore[operator]
    body = total - embedding - (0 if tied else head)
    a_weight = 6 if full else 4
    operations = float(a_weight * (body * tokens + head * trained_tokens))
    return operations / (product_speed(policy.device, policy.precision.compute) * EFFICIENCY)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
