"""Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290, eq. 7) and its relatives.

    loss = mean over pairs of L(r(chosen), r(rejected)),    r(y) = log pi(y|x) - log pi_ref(y|x)

L is `loss_type`'s function of the log-ratios (`objective.dpo_losses`); with `sft_weight` an SFT term is added (`objective.pairs`).
A reward is beta r(y), whatever the loss.

Shapes: S pairs of a step, 2 leaves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tunedock.objective.base import RowLogprobs, Terms
from tunedock.objective.dpo_losses import BY_LENGTH, LOSSES
from tunedock.objective.pairs import OnPairs, PairConstants, pairs_in, with_sft


@dataclass(frozen=True, slots=True)
class Dpo(OnPairs):
    beta: float = 0.1
    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0
    sft_weight: float = 0.0

    name: ClassVar[str] = "dpo"
    needs_reference: ClassVar[bool] = True

    def terms(self, row: RowLogprobs, constants: PairConstants) -> Terms:
        """Metrics by TRL's names, means over pairs; `nll_loss` is a mean over the chosen completions' tokens."""
        assert constants.reference_S2 is not None  # noqa: S101 - `prepare` saw to it
        pairs = pairs_in(row, constants)
        ratio_S2 = pairs.logp_S2 - constants.reference_S2
        told_S2 = ratio_S2 / pairs.length_S2 if self.loss_type in BY_LENGTH else ratio_S2
        loss = pairs.total(LOSSES[self.loss_type](told_S2, self.beta, self.label_smoothing))
        loss, nll = with_sft(loss, pairs, self.sft_weight)
        return Terms(loss, {**pairs.rewards(self.beta * ratio_S2, pairs.logp_S2), **nll})
