"""Decoder layers through PyTorch's compiler. Layers of a model share their code, so it is compiled once for all of them.

Rows differ in length, so shapes are symbolic from the start. A row's attention is left out: how the row is cut is plain Python, and
what computes it is a kernel already; so are products in float8. Dropout draws the numbers it draws uncompiled, so that the two can
be compared. Activations that are computed again are computed again by the compiled code.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

from torch import nn

from tunedock.model import attention, fp8
from tunedock.model.adapter import checkpointable


def compile_layers(model: nn.Module) -> int:
    """Returns how many layers are compiled, when they are called next: those that can compute their activations again."""
    import torch._inductor.config as inductor  # seconds of importing, for those who compile
    from torch import _dynamo as dynamo

    inductor.fallback_random = True
    if hasattr(inductor, "deterministic"):  # since PyTorch 2.10: no kernel is chosen by timing it
        inductor.deterministic = True
    attention.leave_out_of_compiling()
    fp8.leave_out_of_compiling()
    layers = checkpointable(model)
    dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, 8 * (1 + len({type(layer) for layer in layers})))
    for layer in layers:
        layer.forward = _compiled(layer)
    return len(layers)


def run_uncompiled(model: nn.Module) -> None:
    """As before `compile_layers`."""
    for layer in checkpointable(model):
        vars(layer).pop("forward", None)


def _compiled(layer: Any) -> Callable[..., Any]:
    """The layer's forward. transformers wraps it to compute activations again, at which the compiler would give up: so what is
    inside is compiled, and the wrapping done here."""
    import torch

    inner = getattr(type(layer).forward, "__wrapped__", None)
    if inner is None:  # transformers before 5.20 wraps the call, not the forward
        return torch.compile(layer.forward, dynamic=True)
    compiled = torch.compile(MethodType(inner, layer), dynamic=True)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if layer.gradient_checkpointing and layer.training:
            return layer._gradient_checkpointing_func(partial(compiled, **kwargs), *args)
        return compiled(*args, **kwargs)

    return forward
