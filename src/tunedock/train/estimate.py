"""How long training will take, before its first step: operations needed (`plan.speed`) over what the device does in a tenth of a
second. Real steps reach a part of a plain product's speed; the estimate is corrected as steps run.
"""

from __future__ import annotations

import time

import torch

from tunedock.model.policy import Policy
from tunedock.model.quantize import numbers_in
from tunedock.plan.speed import EFFICIENCY, operations

SIDE = 1024

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def calibrate(compute: str) -> dict[str, float]:
    """What this machine's first device does: teraflops of a product in the type a run would compute in, named as a recipe's plan
    does (`plan.memory.Number`)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {"teraflops": product_speed(device, DTYPES[compute]) / 1e12}


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
    inputs = policy.model.get_input_embeddings().weight  # type: ignore[operator]
    total = sum(numbers_in(parameter) for parameter in policy.model.parameters())
    head, tied = 0, False  # a reward model's score is next to nothing
    if not policy.gives_scores:
        outputs = policy.model.get_output_embeddings().weight  # type: ignore[operator]
        head, tied = outputs.numel(), outputs is inputs
    body = total - inputs.numel() - (0 if tied else head)
    speed = product_speed(policy.device, policy.precision.compute)
    return operations(body, head, tokens, trained_tokens, full=full) / (speed * EFFICIENCY[policy.device.type])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
