"""Frozen linear layers in eight bits: weights as float8 (e4m3), a scale for each output; on GPUs with float8 products (Ada, Hopper
and later) the products are float8 too. Source of the format: arXiv 2209.05433.

A product's other factor is rounded to float8 with a scale for each token, so a token's result depends on that token alone: rows
laid out in any way give the same. The gradient is multiplied by the outputs' scales before it is rounded, which leaves the weights'
scales out of the sum. Elsewhere weights are widened for each product: that saves memory, not time.

Shapes: T tokens (all leading dimensions as one), K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

FLOAT8 = torch.float8_e4m3fn
LARGEST = float(torch.finfo(FLOAT8).max)
FINEST_SCALE = 1e-12
"""For what is all zeros."""

ALIGNED = 16
"""Sides of float8 products are multiples of this."""


class Fp8Linear(nn.Linear):
    """A frozen linear layer. `weight` [N, K] holds the bits of float8 numbers as uint8, `scale_N1` what to multiply them by.

    Bits, because PEFT makes adapters in the floating type of the layer they are on, and collectives know no float8.
    """

    scale_N1: Tensor

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False, device="meta")
        float8_NK, scale_N1 = rounded(plain.weight.detach())
        self.weight = nn.Parameter(float8_NK.view(torch.uint8), requires_grad=False)
        self.register_buffer("scale_N1", scale_N1)
        if plain.bias is not None:
            self.bias = nn.Parameter(plain.bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] in any floating type; [..., N] in that of autocast, else in x's."""
        device = x.device.type
        compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        with torch.autocast(device, enabled=False):
            flat_TK = x.reshape(-1, x.shape[-1]).to(compute)
            y_TN: Tensor = _product(flat_TK, self.weight.view(FLOAT8), self.scale_N1, in_float8(self, x.device))
            if self.bias is not None:
                y_TN = y_TN + self.bias.to(compute)
        return y_TN.view(*x.shape[:-1], -1)

    def widened(self) -> Tensor:
        """The weights [N, K] that the bits stand for, float32."""
        return self.weight.view(FLOAT8).float() * self.scale_N1


class _Product(torch.autograd.Function):
    """y = x (q s)^T with q float8 and s the scales of outputs, both frozen; x [T, K], q [N, K], s [N, 1] -> [T, N]."""

    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, float8_NK: Tensor, scale_N1: Tensor, in_float8: bool) -> Tensor:
        ctx.save_for_backward(float8_NK, scale_N1)
        ctx.in_float8 = in_float8
        if not in_float8:
            return x_TK @ _widened(float8_NK, scale_N1, x_TK.dtype).T
        return _float8_product(x_TK, float8_NK, scale_N1.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TN: Tensor) -> tuple[Tensor, None, None, None]:
        float8_NK, scale_N1 = ctx.saved_tensors
        if not ctx.in_float8:
            return grad_TN @ _widened(float8_NK, scale_N1, grad_TN.dtype), None, None, None
        # Products take their second factor transposed: a copy in eight bits, a few hundredths of the product's time.
        float8_KN = float8_NK.view(torch.uint8).T.contiguous().view(FLOAT8)
        one_1K = torch.ones(1, len(float8_KN), dtype=torch.float32, device=grad_TN.device)
        return _float8_product(grad_TN, float8_KN, one_1K, before_N=scale_N1[:, 0]), None, None, None


_product: Callable[..., Tensor] = _Product.apply

_products_in_float8 = True


def leave_out_of_compiling() -> None:
    """PyTorch's compiler goes around the products from here on."""
    global _product
    _product = torch.compiler.disable(_Product.apply)  # type: ignore[no-untyped-call]


@contextmanager
def widened_products() -> Iterator[None]:
    """While it holds, weights are widened everywhere: what is compared then differs by no rounding of the other factor."""
    global _products_in_float8
    before, _products_in_float8 = _products_in_float8, False
    try:
        yield
    finally:
        _products_in_float8 = before


def rounded(wide: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Float8 numbers and a scale [..., 1], float32, for each row (the last dimension), the row's largest made the format's largest.

    `before`: what each column is multiplied by first.
    """
    wide = wide.float() if before is None else wide.float() * before
    scale = (wide.abs().amax(-1, keepdim=True) / LARGEST).clamp_min(FINEST_SCALE)
    return (wide / scale).to(FLOAT8), scale


def in_float8(layer: nn.Linear, device: torch.device) -> bool:
    """Whether products of this layer are made in float8."""
    aligned = layer.in_features % ALIGNED == 0 and layer.out_features % ALIGNED == 0
    nvidia = device.type == "cuda" and torch.version.hip is None
    return _products_in_float8 and aligned and nvidia and torch.cuda.get_device_capability(device) >= (8, 9)


def _widened(float8_NK: Tensor, scale_N1: Tensor, dtype: torch.dtype) -> Tensor:
    return (float8_NK.float() * scale_N1).to(dtype)


def _float8_product(wide_TK: Tensor, float8_NK: Tensor, scale_1N: Tensor, before_N: Tensor | None = None) -> Tensor:
    """wide float8^T in the type of the first; scale_1N multiplies the result's columns."""
    narrow_TK, scale_T1 = _rounded_on(wide_TK.device.type)(wide_TK, before_N)
    made_TN = torch._scaled_mm(  # the operation under torch.nn.functional.scaled_mm, and older
        narrow_TK.contiguous(),
        float8_NK.T,
        scale_a=scale_T1,
        scale_b=scale_1N.contiguous(),
        out_dtype=torch.float32 if wide_TK.dtype == torch.float32 and not wide_TK.is_cuda else torch.bfloat16,
    )
    return made_TN.to(wide_TK.dtype)


@cache
def _rounded_on(device: str) -> Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]:
    """`rounded`; on a GPU as one kernel."""
    return torch.compile(rounded, dynamic=True) if device == "cuda" else rounded
