"""Objective by the recipe's name."""

from __future__ import annotations

from tunedock.objective.base import Objective
from tunedock.objective.likelihood import Pretrain, Sft

_OBJECTIVES: dict[str, type[Objective]] = {"sft": Sft, "pretrain": Pretrain}


def make(name: str) -> Objective:
    return _OBJECTIVES[name]()
