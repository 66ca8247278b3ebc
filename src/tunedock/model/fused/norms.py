"""RMS norms in one pass. Source: arXiv 1910.07467.

Shapes: T tokens (all leading dimensions as one), D size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tunedock.model.fused.comparing import close, in_float32, made_up
from tunedock.model.kernels import Kernels, takes


class _Norm(torch.autograd.Function):
    """y = x / sqrt(mean(x^2) + eps) * (offset + w) over the last dimension; x [..., D], w [D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float, offset: float, compiled: Kernels) -> Tensor:
        y = torch.empty_like(x)
        size = x.shape[-1]
        scale_T = torch.empty(x.numel() // size, dtype=torch.float32)
        compiled("norm", x.dtype, x, weight_D, len(scale_T), size, eps, offset, y, scale_T)
        ctx.save_for_backward(x, weight_D, scale_T)
        ctx.rest = offset, compiled
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        x, weight_D, scale_T = ctx.saved_tensors
        offset, compiled = ctx.rest
        grad, size = grad.contiguous(), x.shape[-1]
        grad_x = torch.empty_like(x)
        compiled("norm_backward", x.dtype, grad, x, weight_D, scale_T, len(scale_T), size, offset, grad_x)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            normed_TD = x.view(-1, size).float() * scale_T[:, None]
            grad_weight = (grad.view(-1, size).float() * normed_TD).sum(0).to(weight_D.dtype)
        return grad_x, grad_weight, None, None, None


_norm: Callable[..., Tensor] = _Norm.apply


def norm_offset(module: Any, compiled: Kernels) -> float | None:
    """0 where the module is a norm that multiplies by its weight, 1 where by one more (Gemma); None where it is something else."""
    eps = _eps(module)
    parameters = dict(module.named_parameters())
    if eps is None or parameters.keys() != {"weight"} or parameters["weight"].ndim != 1:
        return None
    return _offset_of(module, eps, compiled)


def fuse_norm(module: Any, compiled: Kernels, offset: float) -> None:
    """`offset`: what `norm_offset` found."""
    own: Callable[..., Tensor] = module.forward
    eps = _eps(module)

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        weight_D = module.weight
        if args or kwargs or not takes(x, weight_D):
            return own(x, *args, **kwargs)
        made: Tensor = _norm(x, weight_D, eps, offset, compiled)
        return made

    module.forward = forward


def _eps(module: Any) -> float | None:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return eps if isinstance(eps, float) else None


def _offset_of(module: Any, eps: float, compiled: Kernels) -> float | None:
    weight_D: Tensor = module.weight.detach()
    x = made_up(3, len(weight_D))
    try:
        wanted = in_float32(module, x)
    except (TypeError, ValueError, RuntimeError):  # it takes other arguments: another kind of norm
        return None
    for offset in (0.0, 1.0):
        if weight_D.device.type == "cpu" and close(
            _norm(x, weight_D.float().contiguous(), eps, offset, compiled),
            wanted,
        ):
            return offset
    return None
