"""Decoder layers through PyTorch's compiler. Layers of a model share their code, so it is compiled once for all of them.

Rows differ in length, so shapes are symbolic from the start. A row's attention is left out: how the row is cut is plain Python, and
what computes it is a kernel already. Dropout draws the numbers it draws uncompiled, so that the two can be compared.
"""

from __future__ import annotations

from torch import nn

from tunedock.model import attention
from tunedock.model.adapter import checkpointable


def compile_layers(model: nn.Module) -> int:
    """Returns how many layers are compiled, when they are called next: those that can compute their activations again."""
    import torch._inductor.config as inductor  # seconds of importing, for those who compile
    from torch import _dynamo as dynamo
    from torch import compile as compiled

    inductor.fallback_random = True
    attention.leave_out_of_compiling()
    layers = checkpointable(model)
    dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, 8 * (1 + len({type(layer) for layer in layers})))
    for layer in layers:
        layer.forward = compiled(layer.forward, dynamic=True)
    return len(layers)


def run_uncompiled(model: nn.Module) -> None:
    """As before `compile_layers`."""
    for layer in checkpointable(model):
        vars(layer).pop("forward", None)
