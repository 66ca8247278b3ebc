"""Bytes of optimizer state, by the table of names and the shapes of the matrices that are trained."""

from __future__ import annotations

import re
from collections.abc import Iterable

from tunedock.recipe.optimizers import Facts, table

ADAM_BYTES = 8
"""For a name nobody knows: Adam's two moments in float32."""

LOW_RANK = 128
"""GaLore's and APOLLO's rank where `optim_args` says none."""

HIDDEN = re.compile(r"attn|attention|mlp|feed_forward|ffn|experts")
"""Matrices GaLore and APOLLO take by default; `train.parameter_kinds` says the same (a test compares them)."""

Matrix = tuple[str, int, int]
"""Name, rows, columns."""


def optimizer_bytes(optim: str, optim_args: str | None = None) -> float:
    """Bytes of optimizer state a trained number, where it does not depend on which number it is."""
    if optim == "sgd" and "momentum" in (optim_args or ""):
        return 4
    facts = table().get(optim)
    return ADAM_BYTES if facts is None or facts.refused is not None else facts.bytes


def optimizer_state_bytes(optim: str, optim_args: str | None, trained: int, matrices: Iterable[Matrix]) -> float:
    """Bytes of state for `trained` numbers, of which `matrices` are those of hidden layers."""
    each = optimizer_bytes(optim, optim_args)
    facts = table().get(optim, Facts())
    total = trained * each
    if facts.matrix_bytes is not None:
        total += sum(rows * columns for _, rows, columns in matrices) * (facts.matrix_bytes - each)
    elif facts.low_rank is not None:
        for name, rows, columns in matrices:
            if HIDDEN.search(name):
                total += _low_rank(rows, columns, _rank(optim_args), facts, each) - rows * columns * each
    return total


def _low_rank(rows: int, columns: int, rank: int, facts: Facts, each: float) -> float:
    """The projection, and the moments of what it leaves of the gradient (Zhao et al. 2024, arXiv 2403.03507, section 3)."""
    kept = min(rank, rows, columns)
    longer, projection = max(rows, columns), 4 * kept * min(rows, columns)
    if facts.low_rank == "projection":  # Adafactor's row and column of what is left
        return projection + 4 * (longer + kept)
    return projection + kept * longer * each


def _rank(optim_args: str | None) -> int:
    found = re.search(r"(?:^|,)\s*rank\s*=\s*(\d+)", optim_args or "")
    return int(found.group(1)) if found else LOW_RANK
