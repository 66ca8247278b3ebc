"""NEFTune (Jain et al. 2023, arXiv 2310.05914): noise on the embeddings while training, uniform in +-alpha / sqrt(L d).

L is the length of the sample a token belongs to, its path through the row, not of the row: packing samples and sharing prefixes
change nothing in the noise's distribution. Where several paths share a prefix it is computed once, so it draws once, by the longest
of them. The noise comes from the device's random generator, like dropout: a step that is thrown away or resumed draws the same.
B lines of a row, T tokens of a line, d width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tunedock.data.layout import Row


class EmbeddingNoise:
    """Adds noise to what a model's input embedding gives, inside `over(row)` and while the model is in training mode."""

    def __init__(self, model: nn.Module, alpha: float) -> None:
        """Raises ValueError for a model whose embedding cannot be found."""
        get = getattr(model, "get_input_embeddings", None)
        embedding = get() if callable(get) else None
        if embedding is None:
            raise ValueError("the model does not say which layer is its input embedding")
        self._model = model
        self._alpha = alpha
        self._length_BT: Tensor | None = None
        embedding.register_forward_hook(self._hook)

    @contextmanager
    def over(self, row: Row) -> Iterator[None]:
        """The row that the calls inside are about."""
        if not self._model.training:
            yield
            return
        self._length_BT = torch.from_numpy(path_lengths_BT(row))
        try:
            yield
        finally:
            self._length_BT = None

    def _hook(self, module: nn.Module, arguments: Any, embedded_BTd: Tensor) -> Tensor:
        if self._length_BT is None:
            return embedded_BTd
        length_BT = self._length_BT.to(embedded_BTd.device, torch.float32)
        scale_BT = torch.where(length_BT > 0, self._alpha * (length_BT * embedded_BTd.shape[-1]).rsqrt(), 0.0)
        # a row may be filled up to a round width
        scale_BT = nn.functional.pad(scale_BT, (0, embedded_BTd.shape[1] - scale_BT.shape[1]))
        noise_BTd = torch.empty_like(embedded_BTd, dtype=torch.float32).uniform_(-1.0, 1.0)
        return embedded_BTd + (noise_BTd * scale_BT[..., None]).to(embedded_BTd.dtype)


def path_lengths_BT(row: Row) -> NDArray[np.int64]:
    """Tokens of the longest path through each token of a row; 0 where padding stands."""
    if row.tree is None:
        return np.where(row.mask_BT, row.mask_BT.sum(axis=1, keepdims=True), 0).astype(np.int64)
    tree = row.tree
    end_S = np.zeros(len(tree), np.int64)
    for index in range(len(tree)):  # parents stand before their children
        parent = tree.parent_S[index]
        end_S[index] = tree.end_S[index] - tree.start_S[index] + (end_S[parent] if parent >= 0 else 0)
    for index in range(len(tree) - 1, -1, -1):
        parent = tree.parent_S[index]
        if parent >= 0:
            end_S[parent] = max(end_S[parent], end_S[index])
    lengths_BT = np.zeros(row.input_ids_BT.shape, np.int64)
    for index in range(len(tree)):
        lengths_BT[0, tree.start_S[index] : tree.end_S[index]] = end_S[index]
    return lengths_BT
