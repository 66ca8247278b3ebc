"""Tokens that a recipe adds: made in the tokenizer, room made in the embedding and the output layer.

A row that the vocabulary lacks is drawn as transformers does: around the mean of the model's rows, with their covariance, times a
small factor (Hewitt 2021, https://nlp.stanford.edu/~johnhew/vocab-expansion.html). Vocabularies are often padded to a round number:
a row that stands there already stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from tunedock.errors import ModelError
from tunedock.recipe.schema import Model


@dataclass(frozen=True, slots=True)
class NewTokens:
    """What `model.add_tokens` and `model.add_special_tokens` came to."""

    ids: tuple[int, ...] = ()
    """Of the tokens that were made, in order."""
    known: tuple[str, ...] = ()
    """Those that the tokenizer had."""


def add_tokens(tokenizer: PreTrainedTokenizerBase, model: Model) -> NewTokens:
    """Makes the recipe's tokens in `tokenizer`. Raises ModelError where it does not take one."""
    wanted = [*model.add_tokens, *model.add_special_tokens]
    had = set(tokenizer.get_vocab())
    known = tuple(token for token in wanted if token in had)
    tokenizer.add_tokens([token for token in model.add_tokens if token not in had])
    tokenizer.add_tokens([token for token in model.add_special_tokens if token not in had], special_tokens=True)
    made = [token for token in wanted if token not in had]
    ids = tokenizer.convert_tokens_to_ids(made)
    for token, number in zip(made, ids, strict=True):
        if tokenizer(token, add_special_tokens=False)["input_ids"] != [number]:
            raise ModelError(
                f"the tokenizer does not read {token!r} as one token",
                where="model.add_tokens",
                hint="a token that begins inside another, or that the tokenizer normalises, cannot be added",
            )
    return NewTokens(tuple(sorted(ids)), known)


def make_room(model: nn.Module, ids: Sequence[int], *, seed: int, empty: bool = False) -> int:
    """Rows for these tokens in the embedding and the output layer, in place. Returns how many were added.

    `empty`: of a model on the meta device, which has no rows to draw new ones around.
    """
    rows = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    needed = max(ids, default=-1) + 1
    if needed <= rows:
        return 0
    torch.manual_seed(seed)
    model.resize_token_embeddings(needed, mean_resizing=not empty)  # type: ignore[operator]
    return needed - rows
