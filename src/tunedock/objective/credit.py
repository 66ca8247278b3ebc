"""What a rollout measured -> the answers an objective learns from: rewards, divergence and advantages, objective by objective.

Shapes: P prompts, G answers to each, T tokens of an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tunedock.data.sample import Weights
from tunedock.objective.advantages import Floats, generalised, leave_one_out, normalised, relative, whitened
from tunedock.objective.experience import Answer
from tunedock.recipe.objectives.rollout import Grpo, Ppo, Rloo, Rollout


@dataclass(frozen=True, slots=True)
class Measured:
    """An answer and what is known of it."""

    reward: float
    length: int
    """Tokens, T."""
    counts: bool
    """Whether it is trained on."""
    old_T: Weights | None = None
    reference_T: Weights | None = None
    value_T: Weights | None = None

    @property
    def divergence(self) -> float | None:
        """log pi - log pi_ref of the whole answer: an estimate of the KL divergence from the reference."""
        if self.old_T is None or self.reference_T is None:
            return None
        return float((self.old_T.astype(np.float64) - self.reference_T).sum())


def credited(section: Rollout, groups: Sequence[Sequence[Measured]], *, kl_coef: float) -> list[list[Answer]]:
    """The answers with their advantages, group by group. `kl_coef`: what a token's divergence costs now (ppo)."""
    match section:
        case Grpo():
            reward_PG = _rewards(groups)
            return _whole(groups, relative(reward_PG, section.scale_rewards))
        case Rloo():
            return _whole(groups, _left_one_out(section, groups))
        case Ppo():
            return _by_token(section, groups, kl_coef)
    raise ValueError(f"{type(section).__name__} makes no rollouts")


def _rewards(groups: Sequence[Sequence[Measured]]) -> Floats:
    return np.asarray([[answer.reward for answer in group] for group in groups], np.float64)


def _left_one_out(section: Rloo, groups: Sequence[Sequence[Measured]]) -> Floats:
    reward_PG = _rewards(groups)
    if section.reward_clip_range is not None:
        low, high = section.reward_clip_range
        reward_PG = np.clip(reward_PG, low, high)
    if section.beta:
        reward_PG = reward_PG - section.beta * np.asarray(
            [[answer.divergence or 0.0 for answer in group] for group in groups]
        )
    advantage_PG = leave_one_out(reward_PG)
    return normalised(advantage_PG) if section.normalize_advantages else advantage_PG


def _whole(groups: Sequence[Sequence[Measured]], advantage_PG: Floats) -> list[list[Answer]]:
    """Every token of an answer has the answer's advantage."""
    return [
        [
            Answer(
                reward=answer.reward,
                advantage_T=np.full(answer.length, advantage, np.float32),
                old_T=answer.old_T,
                reference_T=answer.reference_T,
            )
            for answer, advantage in zip(group, advantage_G, strict=True)
        ]
        for group, advantage_G in zip(groups, advantage_PG, strict=True)
    ]


def _by_token(section: Ppo, groups: Sequence[Sequence[Measured]], kl_coef: float) -> list[list[Answer]]:
    """Rewards token by token, advantages by GAE, whitened over the tokens that are trained on."""
    answers = [answer for group in groups for answer in group]
    rewards = [_token_rewards(answer, kl_coef) for answer in answers]
    if section.whiten_rewards:
        rewards = whitened(rewards, shift_mean=False)
    pairs = [
        generalised(reward_T, np.asarray(answer.value_T, np.float64), gamma=section.gamma, lam=section.lam)
        for reward_T, answer in zip(rewards, answers, strict=True)
    ]
    counted = [advantage_T for (advantage_T, _), answer in zip(pairs, answers, strict=True) if answer.counts]
    white = iter(whitened(counted))
    made = iter(
        [
            Answer(
                reward=answer.reward,
                advantage_T=(next(white) if answer.counts else advantage_T).astype(np.float32),
                old_T=answer.old_T,
                reference_T=answer.reference_T,
                value_T=answer.value_T,
                return_T=return_T.astype(np.float32),
            )
            for answer, (advantage_T, return_T) in zip(answers, pairs, strict=True)
        ]
    )
    return [[next(made) for _ in group] for group in groups]


def _token_rewards(answer: Measured, kl_coef: float) -> Floats:
    """Each token's divergence from the reference, to its cost; the answer's reward with the last token."""
    reward_T = np.zeros(answer.length)
    if kl_coef and answer.old_T is not None and answer.reference_T is not None:
        reward_T -= kl_coef * (answer.old_T.astype(np.float64) - answer.reference_T)
    reward_T[-1] += answer.reward
    return reward_T


def next_kl_coef(section: Ppo, kl_coef: float, divergences: Sequence[float]) -> float:
    """Moved towards `target_kl` by a fifth of the error at most, over `kl_horizon` answers (Ziegler et al. 2019, arXiv 1909.08593,
    section 2.2)."""
    if section.target_kl is None or not divergences:
        return kl_coef
    error = float(np.clip(np.mean(divergences) / section.target_kl - 1.0, -0.2, 0.2))
    return kl_coef * (1.0 + error * len(divergences) / section.kl_horizon)
