"""Made-up input for a part and its replacement, and when what they give is the same."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CLOSE = 2e-5
"""Largest relative difference between a part and its replacement, in float32."""


def made_up(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(11))


def close(got: Tensor, wanted: Tensor) -> bool:
    return got.shape == wanted.shape and float((got - wanted).abs().max()) <= CLOSE * float(wanted.abs().max() + 1)


def in_float32(module: nn.Module, x: Tensor) -> Tensor:
    """What a small module gives in float32, its own parameters untouched."""
    parameters = {name: parameter.detach().float() for name, parameter in module.named_parameters()}
    with torch.no_grad():
        made: Tensor = torch.func.functional_call(module, parameters, (x,))
    return made
