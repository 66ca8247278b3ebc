"""Whether an engine made the answers with the weights that are trained: its log-probabilities beside the policy's own.

Another kernel and another rounding make a difference of some hundredths a token; an adapter that is stale, or was not applied, one
of another size. vLLM says log-probabilities before the temperature (`--logprobs-mode raw_logprobs`, its default) or after it
(`processed_logprobs`), and not which: where they differ, the policy is read both ways and the nearer counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tunedock.data.sample import Sample
from tunedock.model.answers import Sampled
from tunedock.objective.credit import Measured

Floats = np.ndarray[Any, np.dtype[np.float32]]

TOO_FAR = 0.5
"""Mean absolute difference of a token's log-probability that rounding does not explain."""

READ_AGAIN = 16
"""Answers that are read a second time, at temperature 1."""

METRIC = "sampling/logprob_difference"

TOO_FAR_MEANS = (
    "the engine's log-probabilities are {mean:.2f} a token away from the policy's: it has another base model, another precision "
    "or quantisation of it, or does not apply the adapter it is given"
)


class Agreement:
    def __init__(
        self,
        read_at: Callable[[float, Sequence[Sample]], list[list[Floats]]],
        temperature: float,
        on_warning: Callable[[str], None],
    ) -> None:
        """`read_at`: the policy's log-probabilities at a temperature, by prompt, answer and token."""
        self._read_at = read_at
        self._temperature = temperature
        self._on_warning = on_warning
        self._warned = False

    def __call__(
        self, samples: Sequence[Sample], made: Sequence[Sequence[Sampled]], measured: Sequence[Sequence[Measured]]
    ) -> dict[str, tuple[float, float]]:
        """The metric; nothing where the answers come without log-probabilities."""
        own = [[one.old_T for one in group] for group in measured]
        total, tokens = _differences(made, own)
        if not tokens:
            return {}
        if self._temperature != 1.0:
            some = max(1, READ_AGAIN // max(map(len, made)))
            here = _differences(made[:some], own[:some])
            raw = _differences(made[:some], self._read_at(1.0, samples[:some]))
            if raw[0] < here[0]:
                total, tokens = raw
        mean = total / max(tokens, 1)
        if not mean <= TOO_FAR and not self._warned:
            self._warned = True
            self._on_warning(TOO_FAR_MEANS.format(mean=mean))
        return {METRIC: (total, float(tokens))}


def _differences(made: Sequence[Sequence[Sampled]], own: Sequence[Sequence[Floats | None]]) -> tuple[float, int]:
    """(sum, tokens) of absolute differences, over tokens that both know."""
    total, tokens = 0.0, 0
    for group, of_group in zip(made, own, strict=True):
        for one, own_T in zip(group, of_group, strict=True):
            if one.logprobs is None or own_T is None:
                continue
            known = len(one.logprobs)
            total += float(np.abs(np.asarray(one.logprobs) - own_T[:known]).sum())
            tokens += known
    return total, tokens
