"""Samples -> rows of tokens. A row is what one call of the model takes.

A layout is a pure function of lengths, seed, epoch, step, budget and ranks: any step can be laid out at once, so resuming costs
nothing. The padded layout here is the first one: each leaf's path is a line of its own, lines of like length share a row, and the
line is filled up with padding. It recomputes shared prefixes and pays for padding; in return every model takes it.

Shapes: B lines of a row, T tokens of a line, N chosen tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from tunedock.data.sample import Sample, Segment

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Chosen:
    """The tokens of a row whose log-probability is asked for, in the order of the row.

    `line_N`, `position_N` is the place whose hidden state predicts the token (one before it on its path); `leaf_N` is the index
    among the leaves of its sample. A token that several leaves share is chosen once, for the first of them.
    """

    line_N: Ints
    position_N: Ints
    token_N: Ints
    weight_N: NDArray[np.float32]
    sample_N: Ints
    """Index of the sample within the step."""
    leaf_N: Ints

    def __len__(self) -> int:
        return len(self.token_N)


@dataclass(frozen=True, slots=True)
class Row:
    """One call of the model."""

    input_ids_BT: Ints
    position_ids_BT: Ints
    mask_BT: NDArray[np.bool_]
    """True where a token stands, False where padding does."""
    chosen: Chosen

    @property
    def slots(self) -> int:
        return int(self.input_ids_BT.size)

    @property
    def tokens(self) -> int:
        """Tokens the model computes for, padding not counted."""
        return int(self.mask_BT.sum())


@lru_cache(maxsize=2)
def epoch_order(examples: int, *, seed: int, epoch: int) -> Ints:
    """The order of an epoch: the same on every machine and every rank."""
    order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(examples)
    order.flags.writeable = False  # it is kept for the epoch's other steps
    return order


def step_indices(examples: int, batch_size: int, step: int, *, seed: int, shuffle: bool = True) -> Ints:
    """Indices of the samples of optimizer step `step` (from 0). The last step of an epoch takes what is left."""
    per_epoch = -(-examples // batch_size)
    epoch, within = divmod(step, per_epoch)
    order = epoch_order(examples, seed=seed, epoch=epoch) if shuffle else np.arange(examples)
    return order[within * batch_size : (within + 1) * batch_size]


@dataclass(frozen=True, slots=True)
class _Line:
    tokens_T: NDArray[np.int32]
    weights_T: NDArray[np.float32]
    sample: int
    leaf: int


def _lines(samples: Sequence[Sample]) -> list[_Line]:
    lines: list[_Line] = []
    for number, sample in enumerate(samples):
        counted: set[int] = set()
        for leaf_number, leaf in enumerate(sample.leaves()):
            chain = sample.ancestry(leaf)
            segments: list[Segment] = [sample.segments[i] for i in chain]
            weights = [
                np.zeros_like(segment.weights_T) if i in counted else segment.weights_T
                for i, segment in zip(chain, segments, strict=True)
            ]
            counted.update(chain)
            tokens_T = np.concatenate([segment.tokens_T for segment in segments])
            lines.append(_Line(tokens_T, np.concatenate(weights), number, leaf_number))
    return lines


def padded(samples: Sequence[Sample], *, budget_tokens: int, pad_id: int = 0) -> list[Row]:
    """Rows of at most `budget_tokens` slots each (a single line may be longer: it is a row of its own).

    Lines are sorted by length first, which keeps padding low and makes the result independent of the samples' order.
    """
    lines = sorted(_lines(samples), key=lambda line: (-len(line.tokens_T), line.sample, line.leaf))
    rows: list[Row] = []
    start = 0
    while start < len(lines):
        width = len(lines[start].tokens_T)
        height = max(1, budget_tokens // max(width, 1))
        rows.append(_row(lines[start : start + height], width, pad_id))
        start += height
    return rows


def _row(lines: list[_Line], width: int, pad_id: int) -> Row:
    shape = (len(lines), width)
    input_ids_BT = np.full(shape, pad_id, np.int64)
    mask_BT = np.zeros(shape, np.bool_)
    weights_BT = np.zeros(shape, np.float32)
    for i, line in enumerate(lines):
        length = len(line.tokens_T)
        input_ids_BT[i, :length] = line.tokens_T
        mask_BT[i, :length] = True
        weights_BT[i, :length] = line.weights_T
    weights_BT[:, :1] = 0.0  # nothing predicts the first token
    position_ids_BT = np.broadcast_to(np.arange(width), shape) * mask_BT
    line_N, place_N = np.nonzero(weights_BT)
    chosen = Chosen(
        line_N=line_N,
        position_N=place_N - 1,
        token_N=input_ids_BT[line_N, place_N],
        weight_N=weights_BT[line_N, place_N],
        sample_N=np.asarray([line.sample for line in lines], np.int64)[line_N],
        leaf_N=np.asarray([line.leaf for line in lines], np.int64)[line_N],
    )
    return Row(input_ids_BT, position_ids_BT.astype(np.int64), mask_BT, chosen)
