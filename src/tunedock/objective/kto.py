"""Kahneman-Tversky optimization (Ethayarajh et al. 2024, arXiv 2402.01306, eqs. 7 and 8): answers that are wanted or not, no pairs.

    loss = mean over completions of lambda_y (1 - v(x, y))
    v = sigmoid(beta (r - z)) of a wanted completion, sigmoid(beta (z - r)) of an unwanted one
    r = log pi(y|x) - log pi_ref(y|x)
    z = max(0, mean over the step of log pi(y'|x) - log pi_ref(y'|x))

lambda_y is `desirable_weight` or `undesirable_weight`. z estimates the KL divergence of the policy from the reference, from prompts
with another row's completion y': each prompt of the step takes the completion of the sample that stands a fixed number of places
behind it, the smallest number (mostly 1) for which fewest meet a completion of their own prompt. So each completion is used once.
z has no gradient, and one value for the whole step; a step of one sample has no other completion, and z is 0. Mismatched paths are
cut on the right at the longest path of the step: none needs more room, or a higher position, than training does.

`apo_zero_unpaired` (D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7, of single completions) is the same with z = 0, and asks
about no mismatched ones.

Shapes: N chosen tokens of a row, S completions of a step, M mismatched ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tunedock.data.sample import Sample, Segment
from tunedock.model.reference import leaf_sums
from tunedock.objective.base import Reads, RowLogprobs, StepLogprobs, Terms


@dataclass(frozen=True, slots=True)
class KtoConstants:
    reference_S: Tensor
    wanted_S: Tensor
    """True where the completion is wanted."""
    kl: Tensor
    """z, one number."""


@dataclass(frozen=True, slots=True)
class Kto:
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    loss_type: str = "kto"

    name: ClassVar[str] = "kto"
    reads: ClassVar[Reads] = "logprobs"
    unit: ClassVar[str] = "completions"
    needs_logprobs: ClassVar[bool] = False
    whole_samples: ClassVar[bool] = False
    weighted_sum: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = True

    def count(self, samples: Sequence[Sample]) -> float:
        return float(len(samples))

    def others(self, samples: Sequence[Sample]) -> Sequence[Sample]:
        return mismatched(samples) if self.loss_type == "kto" else ()

    def prepare(self, step: StepLogprobs) -> KtoConstants:
        """Raises ValueError for samples without a verdict."""
        if step.reference_SL is None or step.reference_SL.shape[1] != 1:
            raise ValueError("kto needs the reference's log-probability of one completion a sample")
        if any(sample.wanted is None for sample in step.samples):
            raise ValueError("kto needs a verdict on every completion")
        reference_S = step.reference_SL[:, 0]
        wanted_S = torch.tensor([bool(sample.wanted) for sample in step.samples], device=reference_S.device)
        kl = torch.zeros((), dtype=reference_S.dtype, device=reference_S.device)
        if step.others_SL is not None and step.others_reference_SL is not None:
            kl = (step.others_SL - step.others_reference_SL).mean().clamp(min=0)
        return KtoConstants(reference_S, wanted_S, kl)

    def terms(self, row: RowLogprobs, constants: KtoConstants) -> Terms:
        """Metrics by TRL's names: means over the wanted, or the unwanted, completions; `kl` is z."""
        wanted_S, kl = constants.wanted_S, constants.kl
        shape = (len(wanted_S), 1)
        of = row.sample_N, row.leaf_N
        logp_S = leaf_sums(row.logprob_N, row.weight_N, *of, shape)[:, 0]
        with torch.no_grad():
            here_S = leaf_sums(torch.ones_like(row.logprob_N), torch.ones_like(row.weight_N), *of, shape)[:, 0] > 0
        reward_S = self.beta * (logp_S - constants.reference_S)
        loss_S = self._losses(reward_S, wanted_S, kl)
        metrics: dict[str, tuple[Tensor, Tensor | float]] = {"kl": (kl * here_S.sum(), here_S.sum())}
        for side, which_S in (("chosen", wanted_S), ("rejected", ~wanted_S)):
            there_S = here_S & which_S
            for name, value_S in (("rewards", reward_S), ("logps", logp_S)):
                metrics[f"{name}/{side}"] = torch.where(there_S, value_S.detach(), 0.0).sum(), there_S.sum()
        metrics["rewards/margins"] = self._margins(reward_S.detach(), here_S, wanted_S)
        return Terms(torch.where(here_S, loss_S, 0.0).sum(), metrics)

    def _losses(self, reward_S: Tensor, wanted_S: Tensor, kl: Tensor) -> Tensor:
        """Of every completion. 1 - sigmoid(a) is sigmoid(-a)."""
        above_S = reward_S - self.beta * kl
        wanted = self.desirable_weight * torch.sigmoid(-above_S)
        return torch.where(wanted_S, wanted, self.undesirable_weight * torch.sigmoid(above_S))

    def _margins(self, reward_S: Tensor, here_S: Tensor, wanted_S: Tensor) -> tuple[Tensor, Tensor | float]:
        """The row's share of the mean reward of the wanted less that of the unwanted; nothing where the step has one kind only."""
        wanted, unwanted = wanted_S.sum(), (~wanted_S).sum()
        share_S = torch.where(wanted_S, 1 / wanted.clamp(min=1), -1 / unwanted.clamp(min=1))
        both = (wanted > 0) & (unwanted > 0)
        margin = torch.where(here_S, share_S * reward_S, 0.0).sum() * len(wanted_S)  # a step counts by its completions
        return torch.where(both, margin, 0.0), torch.where(both, here_S.sum(), 0)


def mismatched(samples: Sequence[Sample]) -> list[Sample]:
    """Each sample's prompt with another one's completion; none for a sample alone."""
    if len(samples) < 2:
        return []
    longest = max(sample.longest_path for sample in samples)
    by = _shift(samples)
    return [_crossed(sample, samples[(n + by) % len(samples)], longest) for n, sample in enumerate(samples)]


def _shift(samples: Sequence[Sample]) -> int:
    """How far to look for another completion: the first distance at which fewest samples have the same prompt."""
    prompts = [sample.segments[0].tokens_T.tobytes() for sample in samples]
    best, fewest = 1, len(prompts) + 1
    for by in range(1, len(prompts)):
        same = sum(prompt == prompts[(n + by) % len(prompts)] for n, prompt in enumerate(prompts))
        if same < fewest:
            best, fewest = by, same
        if not same:
            break
    return best


def _crossed(sample: Sample, other: Sample, longest: int) -> Sample:
    prompt, completion = sample.segments[0], other.segments[1]
    room = longest - len(prompt.tokens_T)
    leaf = Segment(completion.tokens_T[:room], completion.weights_T[:room], 0)
    return Sample(f"{sample.row_id} with {other.row_id}", (prompt, leaf))
