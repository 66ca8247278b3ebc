"""REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024, arXiv 2402.14740), its ratio clipped as TRL does.

    loss = - mean over answers of min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A),    r = pi(y | x) / pi_old(y | x)

An answer is one action: r is of the whole of it. A is its reward, less `beta` times its divergence from the reference, over the
mean of the others to its prompt (`objective.advantages`).

Shapes: N chosen tokens of a row, A answers of a step, F their tokens.
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
class AnswerConstants:
    answers: Answers
    advantage_F: Tensor
    """The same for all tokens of an answer."""
    old_F: Tensor | None
    """None: the policy as it is."""


@dataclass(frozen=True, slots=True)
class Rloo:
    epsilon: float = 0.2
    epsilon_high: float | None = None

    name: ClassVar[str] = "rloo"
    unit: ClassVar[str] = "completions"
    reads: ClassVar[Reads] = "logprobs"
    needs_logprobs: ClassVar[bool] = False
    whole_samples: ClassVar[bool] = False
    weighted_sum: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False

    def count(self, samples: Sequence[Sample]) -> float:
        return float(sum(len(sample.segments) - 1 for sample in samples))

    def prepare(self, step: StepLogprobs) -> AnswerConstants:
        """Raises ValueError for samples that are no experiences."""
        return AnswerConstants(
            answers=Answers(step.samples, step.device),
            advantage_F=advantages(step.samples, step.device),
            old_F=by_token(step.samples, lambda a: a.old_T, step.device),
        )

    def terms(self, row: RowLogprobs, constants: AnswerConstants) -> Terms:
        """Metrics by TRL's names: `entropy` (of the sampled tokens) a token, `clip_ratio/*` of answers."""
        answers, weight_N = constants.answers, row.weight_N
        at_N, answer_N = answers.token_N(row), answers.answer_N(row)
        old_N = row.logprob_N.detach() if constants.old_F is None else constants.old_F[at_N]
        ratio_A = answers.sums(weight_N * (row.logprob_N - old_N), answer_N).exp()
        advantage_A = answers.means(constants.advantage_F[at_N], torch.ones_like(weight_N), answer_N)
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        loss_A = -torch.min(ratio_A * advantage_A, ratio_A.clamp(1 - self.epsilon, 1 + high) * advantage_A)
        here_A = answers.here_A(row)
        low_A, high_A = (ratio_A < 1 - self.epsilon) & (advantage_A < 0), (ratio_A > 1 + high) & (advantage_A > 0)
        entropy = -(weight_N * row.logprob_N.detach()).sum()
        metrics: dict[str, tuple[Tensor, Tensor | float]] = {
            "entropy": (entropy, weight_N.sum()),
            "clip_ratio/low_mean": ((low_A & here_A).sum(), here_A.sum()),
            "clip_ratio/high_mean": ((high_A & here_A).sum(), here_A.sum()),
        }
        return Terms(torch.where(here_A, loss_A, 0.0).sum(), metrics)
