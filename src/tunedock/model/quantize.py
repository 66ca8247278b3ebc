"""Base weights in fewer bits, under an adapter: what a recipe's `quantize` names.

`nf4` (four bits, their scales in eight: "double quantisation") and `int8` are bitsandbytes', read so by transformers a weight at a
time; `fp8` is `model.fp8`. Sources: arXiv 2305.14314 (QLoRA), 2208.07339 (LLM.int8()).
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tunedock.errors import DependencyError
from tunedock.model.fp8 import Fp8Linear, in_float8
from tunedock.model.score import score_layer


@dataclass(frozen=True, slots=True)
class Quantised:
    """What of a model is held in fewer bits."""

    layers: int
    size_bytes: int
    products: bool
    """Whether any product is made in those bits; else weights are widened for each."""


def bits_and_bytes(kind: str, compute: torch.dtype) -> Any:
    """transformers' `quantization_config` for `nf4` or `int8`. Raises DependencyError without bitsandbytes."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise DependencyError(
            f"`quantize: {kind}` needs the package bitsandbytes, which is not installed",
            where="quantize",
            hint="pip install 'tunedock[quantize]', or use `quantize: fp8`, which needs none",
        )
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # a line for every product
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def keep_gradients(model: nn.Module) -> None:
    """Keeps bitsandbytes from repacking four-bit weights on a CPU in the first call outside of training.

    Products with repacked weights have no gradient, and say nothing of it: what stands before them would never learn.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def to_fp8(model: nn.Module) -> None:
    """Replaces every linear layer but the output layer, in place, a layer at a time.

    Weights that are no linear layer's (embeddings, fused experts) stay.
    """
    head = score_layer(model) or model.get_output_embeddings()  # type: ignore[operator]
    for parent in [module for module in model.modules() if type(module) is not nn.Linear]:
        for name in [name for name, child in parent.named_children() if type(child) is nn.Linear and child is not head]:
            setattr(parent, name, Fp8Linear(parent.get_submodule(name)))  # type: ignore[arg-type]


def quantised(model: nn.Module) -> Quantised | None:
    """None where nothing is."""
    found = list(_layers(model))
    if not found:
        return None
    return Quantised(len(found), sum(size for size, _ in found), any(products for _, products in found))


def _layers(model: nn.Module) -> Iterator[tuple[int, bool]]:
    """Bytes of each layer in fewer bits, and whether its products are made in them."""
    for module in model.modules():
        weight: Any = module._parameters.get("weight")  # an adapter's layer shows its base's as its own
        if isinstance(module, Fp8Linear):
            yield weight.nbytes + module.scale_N1.nbytes, in_float8(module, weight.device)
        elif (state := getattr(weight, "quant_state", None)) is not None:
            yield weight.nbytes + _state_bytes(state), False
        elif type(weight).__name__ == "Int8Params":
            yield weight.nbytes + 4 * weight.shape[0], True


def numbers_in(parameter: Any) -> int:
    """How many numbers a parameter holds; four-bit ones stand two in a byte."""
    state = getattr(parameter, "quant_state", None)
    return int(parameter.numel()) if state is None else math.prod(state.shape)


def _state_bytes(state: Any) -> int:
    """Of the scales of bitsandbytes' four bits, and of the scales of those."""
    nested = getattr(state, "state2", None)
    return int(state.absmax.nbytes) + (0 if nested is None else int(nested.absmax.nbytes))
