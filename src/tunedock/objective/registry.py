"""The recipe's `objective` section -> the objective."""

from __future__ import annotations

from tunedock.objective.base import Objective
from tunedock.objective.dpo import Dpo
from tunedock.objective.likelihood import Pretrain, Sft
from tunedock.recipe import schema


def make(section: schema.Objective) -> Objective:
    match section:
        case schema.Dpo():
            return Dpo(beta=section.beta, label_smoothing=section.label_smoothing)
        case schema.Pretrain():
            return Pretrain()
        case schema.Sft():
            return Sft()
