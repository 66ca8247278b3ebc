"""The recipe's `objective` section -> the objective."""

from __future__ import annotations

from tunedock.objective.base import Objective
from tunedock.objective.dpo import Dpo
from tunedock.objective.likelihood import Pretrain, Sft
from tunedock.recipe.objectives import Objective as Section
from tunedock.recipe.objectives import likelihood, preference


def make(section: Section) -> Objective:
    match section:
        case preference.Dpo():
            return Dpo(beta=section.beta, label_smoothing=section.label_smoothing)
        case likelihood.Pretrain():
            return Pretrain()
        case likelihood.Sft():
            return Sft()
