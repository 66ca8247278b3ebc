"""The recipe's `objective` section -> the objective."""

from __future__ import annotations

from tunedock.objective.base import Objective
from tunedock.objective.dpo import Dpo
from tunedock.objective.grpo import Grpo
from tunedock.objective.kto import Kto
from tunedock.objective.likelihood import Pretrain, Sft
from tunedock.objective.orpo import Orpo
from tunedock.objective.ppo import Ppo
from tunedock.objective.reward import Reward
from tunedock.objective.rloo import Rloo
from tunedock.objective.simpo import Simpo
from tunedock.recipe.objectives import Objective as Section
from tunedock.recipe.objectives import likelihood, preference, reward, rollout


def make(section: Section) -> Objective:
    match section:
        case preference.Dpo():
            return Dpo(section.beta, section.loss_type, section.label_smoothing, section.sft_weight)
        case preference.Orpo():
            return Orpo(section.beta)
        case preference.Kto():
            return Kto(section.beta, section.desirable_weight, section.undesirable_weight, section.loss_type)
        case preference.Simpo():
            return Simpo(section.beta, section.simpo_gamma, section.sft_weight)
        case reward.Reward():
            return Reward(section.center_rewards_coefficient)
        case rollout.Grpo():
            return Grpo(
                beta=section.beta,
                epsilon=section.epsilon,
                epsilon_high=section.epsilon_high,
                delta=section.delta,
                unbiased_kl=section.use_bias_correction_kl,
                loss_type=section.loss_type,
                level=section.importance_sampling_level,
                max_new_tokens=section.max_new_tokens,
            )
        case rollout.Rloo():
            return Rloo(epsilon=section.epsilon, epsilon_high=section.epsilon_high)
        case rollout.Ppo():
            return Ppo(cliprange=section.cliprange, cliprange_value=section.cliprange_value, vf_coef=section.vf_coef)
        case likelihood.Pretrain():
            return Pretrain()
        case likelihood.Sft():
            return Sft()
