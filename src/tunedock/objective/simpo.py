"""Simple preference optimization (Meng et al. 2024, arXiv 2405.14734, eq. 6): the reward is the mean log-probability, no reference.

    loss = - mean over pairs of log sigmoid(reward(chosen) - reward(rejected) - gamma)
    reward(y) = beta log pi(y|x) / length of y

gamma (`simpo_gamma`) is the margin the chosen one is to win by. With `sft_weight` an SFT term is added (`objective.pairs`):
CPO-SimPO.

Shapes: S pairs of a step, 2 leaves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.nn.functional import logsigmoid

from tunedock.objective.base import RowLogprobs, Terms
from tunedock.objective.pairs import CHOSEN, REJECTED, OnPairs, PairConstants, pairs_in, with_sft


@dataclass(frozen=True, slots=True)
class Simpo(OnPairs):
    beta: float = 2.0
    simpo_gamma: float = 1.0
    sft_weight: float = 0.0

    name: ClassVar[str] = "simpo"

    def terms(self, row: RowLogprobs, constants: PairConstants) -> Terms:
        """Metrics by TRL's names; `logps` are means a token here."""
        pairs = pairs_in(row, constants)
        mean_S2 = pairs.mean_logp_S2
        reward_S2 = self.beta * mean_S2
        loss_S = -logsigmoid(reward_S2[:, CHOSEN] - reward_S2[:, REJECTED] - self.simpo_gamma)
        loss, nll = with_sft(pairs.total(loss_S), pairs, self.sft_weight)
        return Terms(loss, {**pairs.rewards(reward_S2, mean_S2), **nll})
