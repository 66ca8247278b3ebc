"""The parts of a model between its matrix products, each as one operation: norms, gated activations, rotary embeddings, LoRA.

A part is replaced on the instance, and only after the replacement has given, on made-up input, what the part itself gives: what a
class is called or claims to be is not looked at. What does not fit at the time of a call (another type, device or shape, an adapter
switched off, dropout) goes to the module's own forward. On CUDA the parts are Liger's, when it is installed.

Sources: RMS norm, arXiv 1910.07467; gated activations, arXiv 2002.05202; rotary embedding, arXiv 2104.09864; LoRA, arXiv
2106.09685.

Shapes: T tokens (all leading dimensions as one), D size, H heads, K inputs, N outputs, R rank.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from tunedock.model.kernels import Kernels, kernels, takes

Forward = Callable[..., Tensor]

CLOSE = 2e-5
"""Largest relative difference between a part and its replacement, in float32."""


def fuse(model: nn.Module) -> list[str]:
    """Replaces what can be replaced, for calls on the CPU. Returns what was, by kind, with counts."""
    compiled = kernels()
    counts: dict[str, int] = {}

    def count(kind: str, done: bool) -> None:
        counts[kind] = counts.get(kind, 0) + done

    for module in list(model.modules()):
        if "forward" in vars(module):  # replaced already, by us or by somebody who had a reason
            continue
        count("lora", _fuse_lora(module))
        if compiled is not None:
            count("norm", _fuse_norm(module, compiled))
            count("gate", _fuse_gate(module, compiled))
    if compiled is not None:
        for source in {type(module).__module__ for module in model.modules() if hasattr(module, "q_proj")}:
            count("rotary", _fuse_rotary(sys.modules[source], compiled))
    return [f"{number} {kind}" for kind, number in counts.items() if number]


def fuse_with_liger(model: Any) -> list[str]:
    """Liger's kernels for norms, rotary embeddings and gated activations on CUDA, where installed and where they know the model."""
    device = next(model.parameters()).device
    if device.type != "cuda" or importlib.util.find_spec("liger_kernel") is None:
        return []
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN  # type: ignore[import-not-found]

    apply = MODEL_TYPE_TO_APPLY_LIGER_FN.get(model.config.model_type)
    if apply is None:
        return []
    known = inspect.signature(apply).parameters
    # The head is ours: Liger's losses would make the logits of every position.
    options = {name: False for name in ("cross_entropy", "fused_linear_cross_entropy") if name in known}
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    apply(model=base, **options)
    return ["liger"]


# -- LoRA --------------------------------------------------------------------------------------------------------------


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


def _fuse_lora(module: Any) -> bool:
    if type(module) is not LoraLinear or type(module.base_layer) is not nn.Linear:
        return False
    if module.lora_variant or module.lora_bias.get("default") or module.fan_in_fan_out:
        return False
    own: Forward = module.forward
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
    return True


# -- norms -------------------------------------------------------------------------------------------------------------


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


def _fuse_norm(module: Any, compiled: Kernels) -> bool:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    parameters = dict(module.named_parameters())
    if not isinstance(eps, float) or parameters.keys() != {"weight"} or parameters["weight"].ndim != 1:
        return False
    own: Forward = module.forward
    offset = _offset_of(module, eps, compiled)
    if offset is None:
        return False

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        weight_D = module.weight
        if args or kwargs or not takes(x, weight_D):
            return own(x, *args, **kwargs)
        made: Tensor = _norm(x, weight_D, eps, offset, compiled)
        return made

    module.forward = forward
    return True


def _offset_of(module: Any, eps: float, compiled: Kernels) -> float | None:
    """0 where the module multiplies by its weight, 1 where by one more (Gemma); None where it does something else."""
    weight_D: Tensor = module.weight.detach()
    x = _made_up(3, len(weight_D))
    try:
        wanted = _in_float32(module, x)
    except (TypeError, ValueError, RuntimeError):  # it takes other arguments: another kind of norm
        return None
    for offset in (0.0, 1.0):
        if weight_D.device.type == "cpu" and _close(
            _norm(x, weight_D.float().contiguous(), eps, offset, compiled),
            wanted,
        ):
            return offset
    return None


# -- gated activations -------------------------------------------------------------------------------------------------


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


def _fuse_gate(module: Any, compiled: Kernels) -> bool:
    children = dict(module.named_children())
    if not {"gate_proj", "up_proj", "down_proj", "act_fn"} <= children.keys():
        return False
    x = _made_up(64)
    act = next((name for name, own in _ACTIVATIONS.items() if _close(own(x), children["act_fn"](x))), None)
    if act is None or not _is_gated(module):
        return False
    own: Forward = module.forward

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
    return True


def _is_gated(module: Any) -> bool:
    """Whether the module computes down(act(gate(x)) * up(x)), in the type of its weights."""
    weight = next(module.parameters())
    size = module.gate_proj.in_features
    x = _made_up(2, int(size)).to(weight.device, weight.dtype)
    with torch.no_grad():
        try:
            wanted = module(x)
        except (TypeError, ValueError, RuntimeError):
            return False
        return torch.equal(module.down_proj(module.act_fn(module.gate_proj(x)) * module.up_proj(x)), wanted)


# -- rotary embedding --------------------------------------------------------------------------------------------------


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


def _fuse_rotary(source: ModuleType, compiled: Kernels) -> bool:
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

    q, k = (_made_up(1, 3, heads, 8).transpose(1, 2) for heads in (4, 2))
    cos, sin = _made_up(1, 3, 8), _made_up(1, 3, 8).flip(-1).contiguous()
    try:
        wanted = plain(q, k, cos, sin)
    except (TypeError, ValueError, RuntimeError):  # other arguments: another kind of rotation
        return False
    if not all(_close(got, want) for got, want in zip(rotary(q, k, cos, sin), wanted, strict=True)):
        return False
    rotary.__dict__["fused_from"] = plain
    vars(source)["apply_rotary_pos_emb"] = rotary
    return True


# -- made-up input -----------------------------------------------------------------------------------------------------


def _made_up(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(11))


def _close(got: Tensor, wanted: Tensor) -> bool:
    return got.shape == wanted.shape and float((got - wanted).abs().max()) <= CLOSE * float(wanted.abs().max() + 1)


def _in_float32(module: nn.Module, x: Tensor) -> Tensor:
    """What a small module gives in float32, its own parameters untouched."""
    parameters = {name: parameter.detach().float() for name, parameter in module.named_parameters()}
    with torch.no_grad():
        made: Tensor = torch.func.functional_call(module, parameters, (x,))
    return made
