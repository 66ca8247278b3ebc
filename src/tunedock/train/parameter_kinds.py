"""Which trained parameters are matrices of hidden layers: what Muon, GaLore and APOLLO are made for."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

HEADS = re.compile(r"(^|\.)(lm_head|embed_out|score|classifier|v_head|value_head|summary)(\.|$)")
"""Output layers by name; they map hidden states to words or values."""

ROWS = re.compile(r"embedding|trainable_tokens")
"""In the names of what stands for words: adapters of an embedding, rows of new tokens."""

HIDDEN = re.compile(r"attn|attention|mlp|feed_forward|ffn|experts")
"""In the names of attention and feed-forward parts."""


def hidden_matrices(named: Sequence[tuple[str, nn.Parameter]], model: nn.Module | None) -> list[str]:
    """Names of the matrices that map hidden states to hidden states: no embedding, no head, no norm or bias.

    The factors of a LoRA on such a layer are among them. Experts held as one tensor of three dimensions are not.
    """
    outer = _embeddings(model)
    return [
        name
        for name, p in named
        if p.ndim == 2 and id(p) not in outer and ROWS.search(name) is None and HEADS.search(name) is None
    ]


def targeted_matrices(
    named: Sequence[tuple[str, nn.Parameter]], model: nn.Module | None, targets: str | Sequence[str] | None
) -> list[str]:
    """The hidden matrices `train.optim_target_modules` names, by transformers' rules; attention and feed-forward by default.

    `all-linear` is every hidden matrix.
    """
    from transformers.trainer_utils import check_target_module_exists

    matrices = hidden_matrices(named, model)
    if targets is None:
        return [name for name in matrices if HIDDEN.search(name)]
    if isinstance(targets, str) and targets.replace("_", "-") == "all-linear":
        return matrices
    return [name for name in matrices if check_target_module_exists(targets, name.removesuffix(".weight"))]


def _embeddings(model: nn.Module | None) -> set[int]:
    """Weights of input embeddings and of the output layer, which may be one."""
    if model is None:
        return set()
    found = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    if head is not None and getattr(head, "weight", None) is not None:
        found.add(id(head.weight))
    return found
