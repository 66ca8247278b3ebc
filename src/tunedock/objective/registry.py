"""The recipe's `objective` section -> the objective."""

from __future__ import annotations

from tunedock.objective.base import Objective
from tunedock.objective.dpo import Dpo
from tunedock.objective.likelihood import Pretrain, Sft
from tunedock.objective.orpo import Orpo
from tunedock.objective.reward import Reward
from tunedock.objective.simpo import Simpo
from tunedock.recipe.objectives import Objective as Section
from tunedock.recipe.objectives import likelihood, preference, reward


def make(section: Section) -> Objective:
    match section:
        case preference.Dpo():
            return Dpo(section.beta, section.loss_type, section.label_smoothing, section.sft_weight)
        case preference.Orpo():
            return Orpo(section.beta)
        case preference.Simpo():
            return Simpo(section.beta, section.simpo_gamma, section.sft_weight)
        case reward.Reward():
            return Reward(section.center_rewards_coefficient)
        case likelihood.Pretrain():
            return Pretrain()
        case likelihood.Sft():
            return Sft()
