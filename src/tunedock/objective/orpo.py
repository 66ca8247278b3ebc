"""Odds ratio preference optimization (Hong et al. 2024, arXiv 2403.07691, eqs. 4, 6 and 7): SFT and preference in one.

    loss = L_SFT + beta L_OR
    L_SFT = mean of -log p over the chosen completions' trained tokens of the step
    L_OR = - mean over pairs of log sigmoid(log odds(chosen) - log odds(rejected))
    odds(y) = P / (1 - P),    log P = log pi(y|x) / length of y

There is no reference. `beta` is the paper's lambda. TRL's L_SFT is a mean over the prompts' tokens too, LLaMA-Factory's one over
pairs of means over tokens; the paper has the likelihood of the answer, and so has this one, by tokens as `objective: sft` takes it.

A reward is beta log P (TRL's).

Shapes: S pairs of a step, 2 leaves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tunedock.objective.base import RowLogprobs, Terms
from tunedock.objective.pairs import CHOSEN, REJECTED, OnPairs, PairConstants, pairs_in, with_sft

MOST_LOGP = -1e-7
"""Of a mean log-probability: one of 0, which rounding makes of an answer known by heart, would have infinite odds."""


@dataclass(frozen=True, slots=True)
class Orpo(OnPairs):
    beta: float = 0.1

    name: ClassVar[str] = "orpo"

    def terms(self, row: RowLogprobs, constants: PairConstants) -> Terms:
        """Metrics by TRL's names; `logps` are means a token here."""
        pairs = pairs_in(row, constants)
        mean_S2 = pairs.mean_logp_S2
        odds_S2 = log_odds(mean_S2)
        apart_S = odds_S2[:, CHOSEN] - odds_S2[:, REJECTED]
        ratio_S = logsigmoid(apart_S)
        loss, nll = with_sft(pairs.total(-self.beta * ratio_S), pairs, 1.0)
        odds = pairs.means({"log_odds_ratio": ratio_S, "log_odds_chosen": apart_S})
        return Terms(loss, {**pairs.rewards(self.beta * mean_S2, mean_S2), **odds, **nll})


def log_odds(logp: Tensor) -> Tensor:
    """log(P / (1 - P)) of log P, exact near 0 and near minus infinity (Maechler 2012, "Accurately computing log(1 - exp(-a))")."""
    logp = logp.clamp(max=MOST_LOGP)
    rest = torch.where(logp < -math.log(2), torch.log1p(-torch.exp(logp)), torch.log(-torch.expm1(logp)))
    return logp - rest
