"""Base weights in fewer bits, under an adapter: what a recipe's `quantize` names."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from tunedock.model.fp8 import Fp8Linear, in_float8


@dataclass(frozen=True, slots=True)
class Quantised:
    """What of a model is held in fewer bits."""

    layers: int
    numbers: int
    size_bytes: int
    products: bool
    """Whether any product is made in float8, or weights are widened for each."""


def to_fp8(model: nn.Module) -> None:
    """Replaces every linear layer but the output layer, in place, a layer at a time.

    Weights that are no linear layer's (embeddings, fused experts) stay.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    for parent in list(model.modules()):
        for name, plain in list(parent.named_children()):
            if type(plain) is nn.Linear and plain is not head:
                setattr(parent, name, Fp8Linear(plain))


def quantised(model: nn.Module) -> Quantised | None:
    """None where nothing is."""
    layers = [module for module in model.modules() if isinstance(module, Fp8Linear)]
    if not layers:
        return None
    return Quantised(
        layers=len(layers),
        numbers=sum(layer.weight.numel() for layer in layers),
        size_bytes=sum(layer.weight.nbytes + layer.scale_N1.nbytes for layer in layers),
        products=any(in_float8(layer, layer.weight.device) for layer in layers),
    )
