"""Proximal policy optimization (Schulman et al. 2017, arXiv 1707.06347) on the tokens of answers (Ouyang et al. 2022, arXiv
2203.02155; the details by Huang et al. 2024, arXiv 2403.17031).

    loss = - mean over tokens of min(r A, clip(r, 1 - cliprange, 1 + cliprange) A)             (eq. 7)
           + vf_coef / 2 mean of max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2)

r is a token's probability ratio to the policy that gave the answer, A its advantage by GAE, whitened over the rollout; R what the
value V should have been. The answer's reward comes with its last token, and each token's is less `kl_coef` times
log pi - log pi_ref (`train.rollout`).

Shapes: N chosen tokens of a row, F tokens of all answers of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tunedock.data.sample import Sample
from tunedock.objective.base import Reads, RowLogprobs, StepLogprobs, Terms
from tunedock.objective.experience import Answers, advantages, by_token


@dataclass(frozen=True, slots=True)
class TokenConstants:
    answers: Answers
    advantage_F: Tensor
    old_F: Tensor
    value_F: Tensor
    return_F: Tensor


@dataclass(frozen=True, slots=True)
class Ppo:
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    vf_coef: float = 0.1

    name: ClassVar[str] = "ppo"
    unit: ClassVar[str] = "tokens"
    reads: ClassVar[Reads] = "logprobs"
    needs_logprobs: ClassVar[bool] = False
    whole_samples: ClassVar[bool] = False
    weighted_sum: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False

    def count(self, samples: Sequence[Sample]) -> float:
        return sum(sample.weight for sample in samples)

    def prepare(self, step: StepLogprobs) -> TokenConstants:
        """Raises ValueError for samples that are no experiences of a policy with a value head."""
        old_F = by_token(step.samples, lambda a: a.old_T, step.device)
        value_F = by_token(step.samples, lambda a: a.value_T, step.device)
        return_F = by_token(step.samples, lambda a: a.return_T, step.device)
        if old_F is None or value_F is None or return_F is None:
            raise ValueError("ppo needs old log-probabilities, values and returns of every token")
        answers = Answers(step.samples, step.device)
        return TokenConstants(answers, advantages(step.samples, step.device), old_F, value_F, return_F)

    def terms(self, row: RowLogprobs, constants: TokenConstants) -> Terms:
        """Metrics by the names TRL's PPO had: losses, clipped shares, `approxkl` and `ratio` a token."""
        if row.value_N is None:
            raise ValueError("ppo needs a policy with a value head")
        at_N, weight_N = constants.answers.token_N(row), row.weight_N
        advantage_N, old_N = constants.advantage_F[at_N], constants.old_F[at_N]
        value_N, return_N = constants.value_F[at_N], constants.return_F[at_N]
        log_ratio_N = row.logprob_N - old_N
        ratio_N = log_ratio_N.exp()
        clipped_N = ratio_N.clamp(1 - self.cliprange, 1 + self.cliprange)
        policy_N = torch.max(-advantage_N * ratio_N, -advantage_N * clipped_N)
        near_N = value_N + (row.value_N - value_N).clamp(-self.cliprange_value, self.cliprange_value)
        free_N, held_N = (row.value_N - return_N) ** 2, (near_N - return_N) ** 2
        worth_N = 0.5 * torch.max(free_N, held_N)
        loss = (weight_N * (policy_N + self.vf_coef * worth_N)).sum()
        with torch.no_grad():
            of_tokens = {
                "loss/policy": policy_N,
                "loss/value": worth_N,
                "policy/clipfrac": (-advantage_N * clipped_N > -advantage_N * ratio_N).float(),
                "value/clipfrac": (held_N > free_N).float(),
                "policy/approxkl": 0.5 * log_ratio_N**2,
                "ratio": ratio_N,
                "entropy": -row.logprob_N,
            }
            tokens = weight_N.sum()
            metrics: dict[str, tuple[Tensor, Tensor | float]] = {
                name: ((weight_N * of_N).sum(), tokens) for name, of_N in of_tokens.items()
            }
        return Terms(loss, metrics)
