"""What a rollout leaves to learn from: a prompt, its answers, and of each token how it came about and how good it was.

An experience is a sample like any other (a prompt segment and a leaf for each answer), so that every layout takes it; the numbers
by token ride along. An objective lays them one behind the other, once a step, and finds those of a row's tokens by their places.

Shapes: T tokens of an answer, A answers of a step one behind the other, F tokens of those answers, S samples, L leaves of the
sample that has most, N chosen tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tunedock.data.sample import Sample, Segment, Tokens, Weights
from tunedock.objective.base import RowLogprobs


@dataclass(frozen=True, slots=True)
class Answer:
    """A leaf of an experience."""

    reward: float
    advantage_T: Weights
    """How much better than expected it went, from each token on."""
    old_T: Weights | None = None
    """Log-probabilities under the policy that gave the answer; None where that is the policy being trained, as it is."""
    reference_T: Weights | None = None
    """Those of the reference policy, where the objective keeps close to it."""
    value_T: Weights | None = None
    """What the value head expected before each token."""
    return_T: Weights | None = None
    """What it should have expected."""


@dataclass(frozen=True, slots=True)
class Experience(Sample):
    """A prompt (segment 0) and its answers (a segment each, in order)."""

    answers: tuple[Answer, ...] = ()


def asked_and_answered(row_id: str, prompt_T: Tokens, answers: Sequence[Tokens], counts: Sequence[bool]) -> Sample:
    """The tree of a prompt and its answers. An answer that does not count is context that nothing is asked of."""
    root = Segment(prompt_T, np.zeros(len(prompt_T), np.float32))
    leaves = (
        Segment(answer_T, np.full(len(answer_T), float(counted), np.float32), 0)
        for answer_T, counted in zip(answers, counts, strict=True)
    )
    return Sample(row_id, (root, *leaves))


class Answers:
    """The answers of a step's samples, one behind the other."""

    def __init__(self, samples: Sequence[Sample], device: torch.device) -> None:
        leaves = [sample.segments[1:] for sample in samples]
        width = max(len(some) for some in leaves)
        first_SL = np.zeros((len(samples), width), np.int64)
        number_SL = np.zeros((len(samples), width), np.int64)
        lengths: list[int] = []
        at = 0
        for s, some in enumerate(leaves):
            prompt = len(samples[s].segments[0].tokens_T)
            for leaf, segment in enumerate(some):
                first_SL[s, leaf] = at - prompt
                number_SL[s, leaf] = len(lengths)
                lengths.append(len(segment.tokens_T))
                at += len(segment.tokens_T)
        self._first_SL = torch.as_tensor(first_SL, device=device)
        self._number_SL = torch.as_tensor(number_SL, device=device)
        self.length_A = torch.as_tensor(lengths, device=device)
        self.device = device

    def __len__(self) -> int:
        return len(self.length_A)

    def token_N(self, row: RowLogprobs) -> Tensor:
        """Index of each of the row's tokens among those of all answers."""
        return self._first_SL[row.sample_N, row.leaf_N] + row.place_N

    def answer_N(self, row: RowLogprobs) -> Tensor:
        """Index of each of the row's tokens' answer."""
        return self._number_SL[row.sample_N, row.leaf_N]

    def means(self, value_N: Tensor, weight_N: Tensor, answer_N: Tensor) -> Tensor:
        """Weighted means [A] of the row's tokens, by answer; 0 of an answer that is not in the row."""
        weighed_A = self.sums(weight_N, answer_N)
        return self.sums(weight_N * value_N, answer_N) / weighed_A.clamp(min=1e-12)

    def sums(self, value_N: Tensor, answer_N: Tensor) -> Tensor:
        """Sums [A] of the row's tokens, by answer."""
        zero_A = torch.zeros(len(self), dtype=value_N.dtype, device=value_N.device)
        return zero_A.index_add(0, answer_N, value_N)

    def here_A(self, row: RowLogprobs) -> Tensor:
        """Which answers the row holds. An answer never stands in two rows."""
        here_A = torch.zeros(len(self), dtype=torch.bool, device=row.logprob_N.device)
        here_A[self.answer_N(row)] = True
        return here_A


def by_token(samples: Sequence[Sample], of: Callable[[Answer], Weights | None], device: torch.device) -> Tensor | None:
    """One number [F] a token of all answers, float32; None where an answer has none. Raises ValueError for other samples."""
    parts = [of(answer) for answer in _answers(samples)]
    whole = [part for part in parts if part is not None]
    if len(whole) < len(parts):
        return None
    return torch.as_tensor(np.concatenate(whole), dtype=torch.float32, device=device)


def advantages(samples: Sequence[Sample], device: torch.device) -> Tensor:
    """Those [F] of all answers' tokens, float32."""
    found_F = by_token(samples, lambda answer: answer.advantage_T, device)
    assert found_F is not None  # noqa: S101 - every answer has one
    return found_F


def _answers(samples: Sequence[Sample]) -> list[Answer]:
    found = [sample.answers if isinstance(sample, Experience) else None for sample in samples]
    if None in found:
        raise ValueError("these samples were not made by a rollout")
    return [answer for answers in found if answers is not None for answer in answers]
