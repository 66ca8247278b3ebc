"""Rewards -> advantages: how much better than expected an answer was. Pure functions of numbers, in float64.

Shapes: P prompts, G answers to each, T tokens of an answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

TINY = 1e-4
"""Added to a standard deviation before it divides (TRL's)."""


def relative(reward_PG: Floats, scale: Literal["group", "batch", "none"]) -> Floats:
    """GRPO (Shao et al. 2024, arXiv 2402.03300, section 4.1.2): what an answer has over the mean of its prompt's, by the standard
    deviation of these (`group`), of all (`batch`; arXiv 2508.08221), or as it is (`none`; Dr. GRPO, arXiv 2503.20783)."""
    centred_PG = reward_PG - reward_PG.mean(axis=1, keepdims=True)
    if scale == "none":
        return np.asarray(centred_PG)
    if scale == "batch":
        return np.asarray(centred_PG / (_deviation(reward_PG) + TINY))
    over_P1 = np.asarray([[_deviation(reward_G)] for reward_G in reward_PG])
    return np.asarray(centred_PG / (over_P1 + TINY))


def leave_one_out(reward_PG: Floats) -> Floats:
    """RLOO (Ahmadian et al. 2024, arXiv 2402.14740, eq. 8): what an answer has over the mean of the others to its prompt."""
    answers = reward_PG.shape[1]
    if answers < 2:
        raise ValueError("leave-one-out needs two answers to a prompt")
    others_PG = (reward_PG.sum(axis=1, keepdims=True) - reward_PG) / (answers - 1)
    return np.asarray(reward_PG - others_PG)


def normalised(advantage_PG: Floats) -> Floats:
    """Less their mean, by their standard deviation, all of them together."""
    return np.asarray((advantage_PG - advantage_PG.mean()) / (_deviation(advantage_PG) + TINY))


def generalised(reward_T: Floats, value_T: Floats, *, gamma: float, lam: float) -> tuple[Floats, Floats]:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, eq. 16) -> (advantages [T], returns [T]).

    delta_t = r_t + gamma V_t+1 - V_t, A_t = delta_t + gamma lam A_t+1; after the last token there is nothing to expect.
    """
    advantage_T = np.zeros(len(reward_T))
    following, expected = 0.0, 0.0
    for t in range(len(reward_T) - 1, -1, -1):
        delta = reward_T[t] + gamma * expected - value_T[t]
        following = delta + gamma * lam * following
        advantage_T[t] = following
        expected = value_T[t]
    return advantage_T, advantage_T + value_T


def whitened(values: Sequence[Floats], *, shift_mean: bool = True) -> list[Floats]:
    """The same numbers with the mean 0 (with `shift_mean`) and the variance 1 over all of them; where they hardly differ, which is
    rounding and nothing to learn from, a smaller one (TRL's term under the root)."""
    every = np.concatenate(values) if values else np.zeros(0)
    mean = float(every.mean()) if len(every) else 0.0
    deviation = math.sqrt(_deviation(every) ** 2 + 1e-8)
    kept = 0.0 if shift_mean else mean
    return [(value - mean) / deviation + kept for value in values]


def _deviation(values: Floats) -> float:
    """Standard deviation with Bessel's correction; 0 of a single value."""
    return float(values.std(ddof=1)) if values.size > 1 else 0.0
