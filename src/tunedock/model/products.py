"""float32 matrix products at the speed of bfloat16 units, where that costs no digits.

`torch.set_float32_matmul_precision("medium")` lets a backend build a float32 product from bfloat16 ones. Some do it with enough of
them to keep float32's accuracy (oneDNN on CPUs with AVX-512 BF16: 4e-7, at two and a half times the speed), others round the
operands and lose two thirds of the digits. What this machine does is measured.
"""

from __future__ import annotations

import torch

ACCURATE = 2e-6
"""Largest error of a product relative to its largest entry. float32 itself has about 3e-7 here, rounding to bfloat16 2e-3."""

SIDE = 256


def use_fast_float32(device: torch.device) -> bool:
    """Sets "medium" for this process if products keep their accuracy with it, else leaves the setting alone; says which."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    if _error(device) <= ACCURATE:
        return True
    torch.set_float32_matmul_precision(before)
    return False


def _error(device: torch.device) -> float:
    draw = torch.Generator().manual_seed(3)
    a, b = (torch.randn(SIDE, SIDE, generator=draw) for _ in range(2))
    exact = a.double() @ b.double()
    got = (a.to(device) @ b.to(device)).cpu().double()
    return float((got - exact).abs().max() / exact.abs().max())
