"""Rotary embeddings in one pass. Source: arXiv 2104.09864.

Shapes: T tokens, H heads, D size of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tunedock.model.fused.comparing import close, made_up
from tunedock.model.kernels import Kernels, takes


class _Rotate(torch.autograd.Function):
    """x [1, H, T, D], its T the outer one in memory; cos and sin [1, T, D]. The halves of D are turned against each other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, compiled: Kernels) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.compiled = compiled
        return _rotated(x, cos, sin, False, compiled)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        if not _token_major(grad):
            grad = grad.transpose(1, 2).contiguous().transpose(1, 2)
        # The transpose of the rotation: y1 = x1 c1 - x2 s1, y2 = x2 c2 + x1 s2 takes its sines from the other half.
        half = sin.shape[-1] // 2
        turned = torch.cat([sin[..., half:], sin[..., :half]], -1)
        return _rotated(grad, cos, turned, True, ctx.compiled), None, None, None


_rotate: Callable[..., Tensor] = _Rotate.apply


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, back: bool, compiled: Kernels) -> Tensor:
    _, heads, tokens, size = x.shape
    y = x.new_empty(1, tokens, heads, size)
    compiled("rotate", x.dtype, x, x.stride(2), cos, sin, tokens, heads, size, int(back), y)
    return y.transpose(1, 2)


def _token_major(x: Tensor) -> bool:
    """[1, H, T, D] whose heads of a token stand side by side."""
    return x.shape[0] == 1 and x.stride(3) == 1 and x.stride(1) == x.shape[3]


def fuse_rotary(source: ModuleType, compiled: Kernels) -> bool:
    """Replaces a modelling module's `apply_rotary_pos_emb`; it stays for every model of that module, and does what it did."""
    plain: Callable[..., tuple[Tensor, Tensor]] | None = getattr(source, "apply_rotary_pos_emb", None)
    if plain is None or hasattr(plain, "fused_from"):
        return plain is not None

    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        fits = (
            not args
            and not kwargs
            and q.ndim == 4
            and cos.ndim == 3
            and cos.shape == (1, q.shape[2], q.shape[3])
            and q.dtype == k.dtype
            and takes(cos, sin)
            and cos.dtype == q.dtype
            and _token_major(q)
            and _token_major(k)
        )
        if not fits:
            return plain(q, k, cos, sin, *args, **kwargs)
        return _rotate(q, cos, sin, compiled), _rotate(k, cos, sin, compiled)

    q, k = (made_up(1, 3, heads, 8).transpose(1, 2) for heads in (4, 2))
    cos, sin = made_up(1, 3, 8), made_up(1, 3, 8).flip(-1).contiguous()
    try:
        wanted = plain(q, k, cos, sin)
    except (TypeError, ValueError, RuntimeError):  # other arguments: another kind of rotation
        return False
    if not all(close(got, want) for got, want in zip(rotary(q, k, cos, sin), wanted, strict=True)):
        return False
    rotary.__dict__["fused_from"] = plain
    vars(source)["apply_rotary_pos_emb"] = rotary
    return True
