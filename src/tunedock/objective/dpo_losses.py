"""The losses of `objective: dpo` by TRL's names, each a function of the two log-ratios of a pair.

    r(y) = log pi(y|x) - log pi_ref(y|x)        of the chosen completion w and the rejected one l
    m = beta (r(w) - r(l))                      the margin;  s = sigmoid;  e = `label_smoothing`

| loss_type | loss of a pair | source |
|---|---|---|
| sigmoid | -(1 - e) log s(m) - e log s(-m) | Rafailov et al. 2023, 2305.18290, eq. 7; e: Mitchell 2023 |
| sigmoid_norm | -log s(m), r divided by the completion's length | Tulu 3, 2411.15124, eq. 6 |
| ipo | (r(w) - r(l) - 1 / (2 beta))^2, r divided by the completion's length | Azar et al. 2023, 2310.12036, eq. 17 |
| hinge | max(0, 1 - m) | SLiC, Zhao et al. 2023, 2305.10425 |
| robust | (-(1 - e) log s(m) + e log s(-m)) / (1 - 2e) | Chowdhury et al. 2024, 2403.00409, eq. 10 |
| exo_pair | s(m) log(s(m) / (1 - e)) + s(-m) log(s(-m) / e) | Ji et al. 2024, 2402.00856, eq. 16 |
| nca_pair | -log s(beta r(w)) - (log s(-beta r(w)) + log s(-beta r(l))) / 2 | Chen et al. 2024, 2402.05369 |
| apo_zero | 1 - s(beta r(w)) + s(beta r(l)) | D'Oosterlinck et al. 2024, 2408.06266, eq. 7 |
| apo_down | s(beta r(w)) + 1 - s(m) | the same, eq. 8 |
| sppo_hard | (r(w) - 1 / (2 beta))^2 + (r(l) + 1 / (2 beta))^2 | Wu et al. 2024, 2405.00675, eq. 4.7 |
| discopop | -(1 - a) log s(m) + a exp(-m), a = s(m / 0.05) | Lu et al. 2024, 2406.08414, eq. 5 |

IPO's paper sums over tokens in words and divides in its experiments; its authors confirmed the division to TRL. `apo_zero` is for
chosen answers better than the model's own, `apo_down` for worse ones.

Shapes: S pairs, 2 leaves.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Loss = Callable[[Tensor, float, float], Tensor]
"""(log-ratios [S, 2], beta, label smoothing) -> the loss [S] of each pair."""

BY_LENGTH = frozenset({"ipo", "sigmoid_norm"})
"""Losses of the log-ratios a token."""

DISCOPOP_TAU = 0.05


def _margin(ratio_S2: Tensor, beta: float) -> Tensor:
    return beta * (ratio_S2[:, 0] - ratio_S2[:, 1])


def sigmoid(ratio_S2: Tensor, beta: float, smoothing: float) -> Tensor:
    margin_S = _margin(ratio_S2, beta)
    loss_S = -logsigmoid(margin_S)
    return (1 - smoothing) * loss_S - smoothing * logsigmoid(-margin_S) if smoothing else loss_S


def ipo(ratio_S2: Tensor, beta: float, smoothing: float) -> Tensor:
    return (ratio_S2[:, 0] - ratio_S2[:, 1] - 1 / (2 * beta)) ** 2


def hinge(ratio_S2: Tensor, beta: float, smoothing: float) -> Tensor:
    return torch.relu(1 - _margin(ratio_S2, beta))


def robust(ratio_S2: Tensor, beta: float, smoothing: float) -> Tensor:
    margin_S = _margin(ratio_S2, beta)
    return (smoothing * logsigmoid(-margin_S) - (1 - smoothing) * logsigmoid(margin_S)) / (1 - 2 * smoothing)


def exo_pair(ratio_S2: Tensor, beta: float, smoothing: float) -> Tensor:
    """KL of the policy's choice between the two from the smoothed label. Infinite without smoothing; a rule asks for some."""
    margin_S = _margin(ratio_S2, beta)
    log_label = torch.tensor([1 - smoothing, smoothing], dtype=margin_S.dtype, device=margin_S.device).log()
    won_S = torch.sigmoid(margin_S) * (logsigmoid(margin_S) - log_label[0])
    return won_S + torch.sigmoid(-margin_S) * (logsigmoid(-margin_S) - log_label[1])


def nca_pair(ratio_S2: Tensor, beta: float, smoothing: float) -> Tensor:
    reward_S2 = beta * ratio_S2
    return -logsigmoid(reward_S2[:, 0]) - 0.5 * logsigmoid(-reward_S2).sum(1)


def apo_zero(ratio_S2: Tensor, beta: float, smoothing: float) -> Tensor:
    reward_S2 = beta * ratio_S2
    return torch.sigmoid(-reward_S2[:, 0]) + torch.sigmoid(reward_S2[:, 1])


def apo_down(ratio_S2: Tensor, beta: float, smoothing: float) -> Tensor:
    return torch.sigmoid(beta * ratio_S2[:, 0]) + torch.sigmoid(-_margin(ratio_S2, beta))


def sppo_hard(ratio_S2: Tensor, beta: float, smoothing: float) -> Tensor:
    return (ratio_S2[:, 0] - 0.5 / beta) ** 2 + (ratio_S2[:, 1] + 0.5 / beta) ** 2


def discopop(ratio_S2: Tensor, beta: float, smoothing: float) -> Tensor:
    """The product a exp(-m) is taken in its exponent: far below zero exp(-m) overflows where the share a is nothing."""
    margin_S = _margin(ratio_S2, beta)
    log_share_S = logsigmoid(margin_S / DISCOPOP_TAU)
    return -logsigmoid(margin_S) * torch.sigmoid(-margin_S / DISCOPOP_TAU) + torch.exp(log_share_S - margin_S)


LOSSES: dict[str, Loss] = {
    "sigmoid": sigmoid,
    "sigmoid_norm": sigmoid,
    "ipo": ipo,
    "hinge": hinge,
    "robust": robust,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "sppo_hard": sppo_hard,
    "discopop": discopop,
}
