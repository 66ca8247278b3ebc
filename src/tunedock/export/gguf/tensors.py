"""A model's tensors as llama.cpp names and lays them out.

Names come from the `gguf` package. Layouts differ in two places, by family: rows of the query and key projections where RoPE turns
neighbours, and norms whose weight is kept less one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tunedock.errors import ModelError
from tunedock.export.gguf.shape import HINT, Shape

Array = NDArray[np.float32]

ROPE_FACTORS = "rope_freqs.weight"
TIED = "lm_head.weight"
"""transformers' name of the head, which is the embedding again where they are tied."""


def tensors(state: Mapping[str, Tensor], shape: Shape) -> Iterator[tuple[str, Array]]:
    """(llama.cpp's name, float32) of each tensor, in the order of the state; a head that is the embedding is left out.

    Raises ModelError for one that llama.cpp has no place for.
    """
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == shape.family.arch)
    names = gguf.get_tensor_name_map(arch, shape.layers)
    if shape.rope_factors is not None:
        yield ROPE_FACTORS, shape.rope_factors
    for name, tensor in state.items():
        if name.endswith("rotary_emb.inv_freq") or (shape.tied and name == TIED):
            continue
        ours = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if ours is None:
            raise ModelError(f"llama.cpp has no place for the tensor `{name}`", where="--format gguf", hint=HINT)
        yield ours, laid_out(ours, tensor.detach().to("cpu", torch.float32).numpy(), shape)


def laid_out(name: str, values: Array, shape: Shape) -> Array:
    """A tensor's values as llama.cpp has them."""
    if shape.family.norm_plus_one and name.endswith("norm.weight"):
        return values + 1.0
    if shape.family.rotates_pairs and ".attn_q." in name:
        return _paired(values, shape.heads)
    if shape.family.rotates_pairs and ".attn_k." in name:
        return _paired(values, shape.kv_heads)
    return values


def _paired(values: Array, heads: int) -> Array:
    """Row i of a head's first half beside row i of its second: [heads * head_dim, ...] -> the same shape."""
    halves = values.reshape(heads, 2, -1, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))
