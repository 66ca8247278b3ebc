"""LoRA's low-rank product, accumulated into the base's. Source: arXiv 2106.09685.

Shapes: T tokens (all leading dimensions as one), K inputs, N outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional


class _LoraProduct(torch.autograd.Function):
    """y = x W^T + b + s (x A^T) B^T with W and b frozen; x [T, K], W [N, K], A [R, K], B [N, R] -> [T, N].

    PEFT makes the low-rank product on its own and adds it; here it is accumulated into the base product, and its gradient into the
    base's, so that nothing as large as y or x is read and written only to be added.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, a_RK: Tensor, b_NR: Tensor, scale: float
    ) -> Tensor:
        a, b = a_RK.to(x_TK.dtype), (b_NR * scale).to(x_TK.dtype)
        low_TR = x_TK @ a.T
        y_TN = functional.linear(x_TK, weight_NK, bias_N)
        y_TN.addmm_(low_TR, b.T)
        ctx.save_for_backward(x_TK, low_TR, weight_NK, a, b)
        ctx.scale, ctx.dtype = scale, a_RK.dtype
        return y_TN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TN: Tensor) -> tuple[Tensor | None, ...]:
        x_TK, low_TR, weight_NK, a, b = ctx.saved_tensors
        up_TR = grad_TN @ b
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_TN @ weight_NK
            grad_x.addmm_(up_TR, a)
        grad_a = (up_TR.T @ x_TK).to(ctx.dtype)
        grad_b = (grad_TN.T @ low_TR).to(ctx.dtype) * ctx.scale
        return grad_x, None, None, grad_a, grad_b, None


_lora_product: Callable[..., Tensor] = _LoraProduct.apply


def is_plain_lora(module: Any) -> bool:
    """Whether it is PEFT's linear layer without what changes the product (DoRA and others)."""
    if type(module) is not LoraLinear or type(module.base_layer) is not nn.Linear:
        return False
    return not (module.lora_variant or module.lora_bias.get("default") or module.fan_in_fan_out)


def fuse_lora(module: Any) -> None:
    """Of a module that `is_plain_lora`."""
    own: Callable[..., Tensor] = module.forward
    base = module.base_layer

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        active = module.active_adapters
        if (
            module.disable_adapters
            or module.merged
            or args
            or kwargs
            or len(active) != 1
            or active[0] not in module.lora_A
            or not isinstance(module.lora_dropout[active[0]], nn.Identity)
            or base.weight.requires_grad
            or x.dtype != base.weight.dtype
            or type(base.weight.data) is not Tensor
            or (base.bias is not None and base.bias.requires_grad)
        ):
            return own(x, *args, **kwargs)
        name = active[0]
        a, b = module.lora_A[name].weight, module.lora_B[name].weight
        flat = x.reshape(-1, x.shape[-1])
        with torch.autocast(x.device.type, enabled=False):
            made: Tensor = _lora_product(flat, base.weight, base.bias, a, b, float(module.scaling[name]))
        return made.view(*x.shape[:-1], -1)

    module.forward = forward
