"""Gated activations in one pass. Source: arXiv 2002.05202."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from tunedock.model.fused.comparing import close, made_up
from tunedock.model.kernels import Kernels, takes


class _Gate(torch.autograd.Function):
    """y = act(gate) * up, element by element."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: str, compiled: Kernels) -> Tensor:
        y = torch.empty_like(gate)
        compiled(act, gate.dtype, gate, up, gate.numel(), y)
        ctx.save_for_backward(gate, up)
        ctx.rest = act, compiled
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        gate, up = ctx.saved_tensors
        act, compiled = ctx.rest
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        compiled(f"{act}_backward", gate.dtype, grad.contiguous(), gate, up, gate.numel(), grad_gate, grad_up)
        return grad_gate, grad_up, None, None


_gate: Callable[..., Tensor] = _Gate.apply


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


def gate_act(module: Any) -> str | None:
    """The activation of a module that computes down(act(gate(x)) * up(x)); None for another, or with an activation not known."""
    children = dict(module.named_children())
    if not {"gate_proj", "up_proj", "down_proj", "act_fn"} <= children.keys():
        return None
    x = made_up(64)
    act = next((name for name, own in _ACTIVATIONS.items() if close(own(x), children["act_fn"](x))), None)
    return act if act is not None and _is_gated(module) else None


def fuse_gate(module: Any, compiled: Kernels, act: str) -> None:
    """`act`: what `gate_act` found."""
    own: Callable[..., Tensor] = module.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs:
            return own(x, *args, **kwargs)
        gate, up = module.gate_proj(x), module.up_proj(x)
        if takes(gate, up):
            made: Tensor = module.down_proj(_gate(gate, up, act, compiled))
        else:
            made = module.down_proj(module.act_fn(gate) * up)
        return made

    module.forward = forward


def _is_gated(module: Any) -> bool:
    """Whether the module computes down(act(gate(x)) * up(x)), in the type of its weights."""
    weight = next((p for p in module.parameters() if p.is_floating_point()), torch.zeros(()))
    size = module.gate_proj.in_features
    x = made_up(2, int(size)).to(weight.device, weight.dtype)
    with torch.no_grad():
        try:
            wanted = module(x)
        except (TypeError, ValueError, RuntimeError):
            return False
        return torch.equal(module.down_proj(module.act_fn(module.gate_proj(x)) * module.up_proj(x)), wanted)
