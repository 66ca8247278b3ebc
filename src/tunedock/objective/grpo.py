"""Group relative policy optimization (Shao et al. 2024, arXiv 2402.03300, eq. 3), and what grew from it.

    loss = - mean over tokens of min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A) + beta KL
    r = pi(y_t | ...) / pi_old(y_t | ...),    KL = pi_ref / pi - log(pi_ref / pi) - 1

with `unbiased_kl` KL times r, whose gradient is that of the divergence itself (DeepSeek-V3.2, arXiv 2512.02556). A is an answer's
reward over the mean of its group's (`objective.advantages`). The mean is taken

- `grpo`: within each answer, then over answers (eq. 3);
- `dapo`: over all tokens of the step (DAPO, arXiv 2503.14476, eq. 12);
- `dr_grpo`: over answers times the most tokens one may have (Dr. GRPO, arXiv 2503.20783);
- `cispo`: as `dapo`, of r' A log pi with r' = min(r, epsilon_high), a constant (MiniMax-M1, arXiv 2506.13585, eq. 4).

With `level: sequence` r is an answer's: the geometric mean of its tokens' (GSPO, arXiv 2507.18071, eq. 5). `delta` bounds r where a
negative advantage would let it grow (INTELLECT-2, arXiv 2505.07291). Defaults are TRL's.

Shapes: N chosen tokens of a row, A answers of a step, F their tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tunedock.data.sample import Sample
from tunedock.objective.base import Reads, RowLogprobs, StepLogprobs, Terms
from tunedock.objective.experience import Answers, advantages, by_token


@dataclass(frozen=True, slots=True)
class GroupConstants:
    answers: Answers
    advantage_F: Tensor
    old_F: Tensor | None
    """None: the policy as it is."""
    reference_F: Tensor | None


@dataclass(frozen=True, slots=True)
class Grpo:
    beta: float = 0.0
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    unbiased_kl: bool = True
    loss_type: Literal["grpo", "dapo", "dr_grpo", "cispo"] = "dapo"
    level: Literal["token", "sequence"] = "token"
    max_new_tokens: int = 256
    """What `dr_grpo` divides by."""

    name: ClassVar[str] = "grpo"
    reads: ClassVar[Reads] = "logprobs"
    needs_logprobs: ClassVar[bool] = False
    whole_samples: ClassVar[bool] = False
    weighted_sum: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False
    """Experiences bring what the reference said, token by token."""

    @property
    def unit(self) -> str:
        return "tokens" if self.loss_type in ("dapo", "cispo") else "completions"

    def count(self, samples: Sequence[Sample]) -> float:
        if self.unit == "tokens":
            return sum(sample.weight for sample in samples)
        completions = float(sum(len(sample.segments) - 1 for sample in samples))
        return completions * self.max_new_tokens if self.loss_type == "dr_grpo" else completions

    def prepare(self, step: StepLogprobs) -> GroupConstants:
        """Raises ValueError for samples that are no experiences, or lack the reference that `beta` asks for."""
        reference_F = by_token(step.samples, lambda a: a.reference_T, step.device) if self.beta else None
        if self.beta and reference_F is None:
            raise ValueError("`beta` needs the reference's log-probabilities")
        return GroupConstants(
            answers=Answers(step.samples, step.device),
            advantage_F=advantages(step.samples, step.device),
            old_F=by_token(step.samples, lambda a: a.old_T, step.device),
            reference_F=reference_F,
        )

    def terms(self, row: RowLogprobs, constants: GroupConstants) -> Terms:
        """Metrics by TRL's names: `kl` and `entropy` (of the sampled tokens) a token, `clip_ratio/*` of tokens or answers."""
        answers, weight_N = constants.answers, row.weight_N
        at_N, answer_N = answers.token_N(row), answers.answer_N(row)
        advantage_N = constants.advantage_F[at_N]
        old_N = row.logprob_N.detach() if constants.old_F is None else constants.old_F[at_N]
        log_ratio_N = row.logprob_N - old_N
        if self.level == "sequence":
            log_ratio_N = answers.means(log_ratio_N, weight_N, answer_N)[answer_N]
        ratio_N = log_ratio_N.exp()
        loss_N, clipped = self._policy_loss(row.logprob_N, ratio_N, advantage_N)
        tokens = weight_N.sum()
        metrics: dict[str, tuple[Tensor, Tensor | float]] = {
            name: ((weight_N * of_N).sum(), tokens) for name, of_N in clipped.items()
        }
        metrics["entropy"] = (-(weight_N * row.logprob_N.detach()).sum(), tokens)
        if constants.reference_F is not None:
            away_N = constants.reference_F[at_N] - row.logprob_N
            kl_N = away_N.exp() - away_N - 1.0
            loss_N = loss_N + self.beta * (kl_N * ratio_N if self.unbiased_kl else kl_N)
            metrics["kl"] = ((weight_N * kl_N.detach()).sum(), tokens)
        if self.loss_type == "grpo":
            return Terms(answers.means(loss_N, weight_N, answer_N).sum(), metrics)
        return Terms((weight_N * loss_N).sum(), metrics)

    def _policy_loss(self, logprob_N: Tensor, ratio_N: Tensor, advantage_N: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """And which ratios were clipped, for the metrics."""
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        if self.loss_type == "cispo":
            loss_N = -ratio_N.clamp(max=high).detach() * advantage_N * logprob_N
            return loss_N, {"clip_ratio/high_mean": ((ratio_N > high) & (advantage_N > 0)).float()}
        low_N, high_N = ratio_N < 1 - self.epsilon, ratio_N > 1 + high
        bounded_N = ratio_N if self.delta is None else ratio_N.clamp(max=self.delta)
        loss_N = -torch.min(bounded_N * advantage_N, ratio_N.clamp(1 - self.epsilon, 1 + high) * advantage_N)
        low_N, high_N = low_N & (advantage_N < 0), high_N & (advantage_N > 0)
        return loss_N, {"clip_ratio/low_mean": low_N.float(), "clip_ratio/high_mean": high_N.float()}
