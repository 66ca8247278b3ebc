"""What the objectives on pairs share: the log-probabilities of a pair's two completions, however its leaves are split over rows.

A pair is a sample with two leaves: 0 is chosen, 1 rejected. Where the token budget puts them into two rows, each row knows the
other leaf as a constant, read in a pass without gradient. The gradient of a sum over leaves is the sum of the leaves' gradients, so
each row's is exact; the pair's value counts in the row of leaf 0. (With dropout the constant is a draw of its own.)

log pi(y|x) is the sum over the completion's trained tokens, each times its weight; its length is the sum of those weights, which
is the number of trained tokens where no row says otherwise.

An SFT term can be added to each of them: `sft_weight` times the mean of -log p over the trained tokens of all chosen completions
of the step, a token's weight counted as its share (TRL's loss type `sft`, CPO's `cpo_alpha`). An evaluation takes it, as it takes
the pairs, 128 pairs a step.

Shapes: N chosen tokens of a row, S pairs of a step, 2 leaves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tunedock.data.sample import Sample
from tunedock.model.reference import leaf_sums, sum_type
from tunedock.objective.base import Reads, RowLogprobs, StepLogprobs

CHOSEN, REJECTED = 0, 1


@dataclass(frozen=True, slots=True)
class PairConstants:
    """What a row cannot know by itself."""

    policy_S2: Tensor
    """log pi of the leaves of pairs that stand in several rows, detached; 0 elsewhere."""
    length_S2: Tensor
    """Weights of each leaf's trained tokens, added up."""
    reference_S2: Tensor | None = None
    """log pi_ref of both leaves, where the objective has a reference."""


@dataclass(frozen=True, slots=True)
class Pairs:
    """The pairs of a step as one row sees them."""

    logp_S2: Tensor
    """log pi of both leaves, with gradient for those that stand in the row. Of pairs of other rows: nothing of use."""
    length_S2: Tensor
    here_S2: Tensor
    """Which leaves stand in the row."""

    @property
    def mean_logp_S2(self) -> Tensor:
        """log pi a trained token."""
        return self.logp_S2 / self.length_S2

    @property
    def counts_S(self) -> Tensor:
        """Pairs whose value counts in this row."""
        return self.here_S2[:, CHOSEN]

    def total(self, loss_S: Tensor) -> Tensor:
        """The row's share of the sum of a loss over pairs, its gradient that of every leaf in the row."""
        value_S = torch.where(self.counts_S, loss_S, loss_S - loss_S.detach())
        return torch.where(self.here_S2.any(1), value_S, 0.0).sum()

    def nll(self) -> tuple[Tensor, Tensor]:
        """(minus the log-probability of the chosen completions that stand in the row, their lengths), added up."""
        nll_S = torch.where(self.counts_S, -self.logp_S2[:, CHOSEN], 0.0)
        return nll_S.sum(), torch.where(self.counts_S, self.length_S2[:, CHOSEN], 0.0).sum()

    def means(self, values: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor | float]]:
        """Metrics that are means over pairs."""
        pairs = self.counts_S.sum()
        return {name: (torch.where(self.counts_S, of.detach(), 0.0).sum(), pairs) for name, of in values.items()}

    def rewards(self, reward_S2: Tensor, logp_S2: Tensor) -> dict[str, tuple[Tensor, Tensor | float]]:
        """The metrics of pairs by TRL's names, of what the objective calls a reward and a log-probability."""
        margin_S = reward_S2[:, CHOSEN] - reward_S2[:, REJECTED]
        return self.means(
            {
                "rewards/chosen": reward_S2[:, CHOSEN],
                "rewards/rejected": reward_S2[:, REJECTED],
                "rewards/accuracies": (margin_S > 0).to(margin_S.dtype),
                "rewards/margins": margin_S,
                "logps/chosen": logp_S2[:, CHOSEN],
                "logps/rejected": logp_S2[:, REJECTED],
            }
        )


class OnPairs:
    """An objective whose samples are pairs: what it asks for, and its constants."""

    name: ClassVar[str]
    unit: ClassVar[str] = "pairs"
    reads: ClassVar[Reads] = "logprobs"
    needs_logprobs: ClassVar[bool] = False
    whole_samples: ClassVar[bool] = True
    weighted_sum: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False

    def count(self, samples: Sequence[Sample]) -> float:
        return float(len(samples))

    def prepare(self, step: StepLogprobs) -> PairConstants:
        """Raises ValueError for samples that are no pairs."""
        lengths = [[leaf_length(sample, leaf) for leaf in sample.leaves()] for sample in step.samples]
        if any(len(both) != 2 for both in lengths):
            raise ValueError(f"{self.name} compares the two leaves of a pair, and a sample has another number of them")
        reference_S2 = step.reference_SL
        if self.needs_reference and (reference_S2 is None or reference_S2.shape[1] != 2):
            raise ValueError(f"{self.name} needs the reference's log-probabilities of two leaves a sample")
        device = step.device
        length_S2 = torch.tensor(lengths, dtype=sum_type(device), device=device)
        policy_S2 = torch.zeros_like(length_S2)
        for row in step.rows:
            policy_S2 += _leaves(row, length_S2)[0]
        return PairConstants(policy_S2, length_S2, reference_S2 if self.needs_reference else None)


def pairs_in(row: RowLogprobs, constants: PairConstants) -> Pairs:
    own_S2, here_S2 = _leaves(row, constants.length_S2)
    return Pairs(torch.where(here_S2, own_S2, constants.policy_S2), constants.length_S2, here_S2)


def with_sft(loss: Tensor, pairs: Pairs, sft_weight: float) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor | float]]]:
    """(the row's sum with the SFT term added, the term's metric). The loop divides by the pairs, the term is a mean over tokens."""
    if not sft_weight:
        return loss, {}
    nll, length = pairs.nll()
    loss = loss + sft_weight * nll * (len(pairs.length_S2) / pairs.length_S2[:, CHOSEN].sum())
    return loss, {"nll_loss": (nll.detach(), length)}


def leaf_length(sample: Sample, leaf: int) -> float:
    """Weights of a leaf's trained tokens, added up. Nothing predicts a path's first token."""
    return float(sample.path(leaf)[1][1:].sum())


def _leaves(row: RowLogprobs, like_S2: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probability [S, 2] of the leaves in the row, which leaves those are)."""
    of = row.sample_N, row.leaf_N
    sums_S2 = leaf_sums(row.logprob_N, row.weight_N, *of, like_S2.shape)
    with torch.no_grad():
        here_S2 = leaf_sums(torch.ones_like(row.logprob_N), torch.ones_like(row.weight_N), *of, like_S2.shape) > 0
    return sums_S2, here_S2
