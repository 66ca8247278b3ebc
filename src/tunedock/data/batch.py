"""Rows as tensors on a device. N chosen tokens, B lines, T tokens a line."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tunedock.data.layout import Row, Tree


@dataclass(frozen=True, slots=True)
class RowTensors:
    input_ids_BT: Tensor
    position_ids_BT: Tensor
    attention_mask_BT: Tensor | None
    """1 where a token stands; None when there is no padding, which lets attention take its causal fast path."""
    flat_N: Tensor
    """line * T + position of the hidden state that predicts each chosen token."""
    token_N: Tensor
    weight_N: Tensor
    sample_N: Tensor
    leaf_N: Tensor
    place_N: Tensor
    """Tokens before each chosen token on its path."""
    own_N: Tensor
    """line * T + position of each chosen token itself."""
    tree: Tree | None = None
    """How the one line's tokens hang together; it may end before the line does (`width`)."""


def to_device(row: Row, device: torch.device, *, width: int | None = None) -> RowTensors:
    """Copies a row to the device; from pinned memory and without waiting on CUDA.

    `width`: fills a tree's row up to as many tokens, which no token sees and nothing is asked of.
    """

    def move(array: object, dtype: torch.dtype) -> Tensor:
        tensor = torch.as_tensor(array, dtype=dtype)
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

    width = width or row.input_ids_BT.shape[1]
    filler = ((0, 0), (0, width - row.input_ids_BT.shape[1]))
    chosen = row.chosen
    return RowTensors(
        input_ids_BT=move(np.pad(row.input_ids_BT, filler), torch.int64),
        position_ids_BT=move(np.pad(row.position_ids_BT, filler), torch.int64),
        attention_mask_BT=None if row.mask_BT.all() else move(row.mask_BT, torch.int64),
        flat_N=move(chosen.line_N * width + chosen.position_N, torch.int64),
        token_N=move(chosen.token_N, torch.int64),
        weight_N=move(chosen.weight_N, torch.float32),
        sample_N=move(chosen.sample_N, torch.int64),
        leaf_N=move(chosen.leaf_N, torch.int64),
        place_N=move(row.position_ids_BT[chosen.line_N, chosen.position_N] + 1, torch.int64),
        own_N=move(chosen.line_N * width + chosen.own_N, torch.int64),
        tree=row.tree,
    )
