"""A sample: a small tree of token segments.

A prompt is a segment, each completion a segment that continues it. SFT has one path from the root to a leaf, DPO two, GRPO many;
a conversation whose template drops earlier thinking has one leaf per trained turn. Every layout (padded, packed, tree) reads the
same samples, and an objective sees log-probabilities by (sample, leaf), never by layout.

Shapes: T tokens of a segment or a path, L leaves of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]
Weights = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Segment:
    tokens_T: Tokens
    weights_T: Weights
    """Loss weight of predicting token t from all tokens before it on its path; 0 where the token is context only."""
    parent: int = -1
    """Index of the segment this one continues; -1 for the root."""


@dataclass(frozen=True, slots=True)
class Sample:
    row_id: str
    """Where it came from (`file:line`), for people."""
    segments: tuple[Segment, ...]
    """Parents stand before their children; the first is the root."""
    margin: float = 0.0
    """Of a pair for a reward model: by how much the score of the first leaf should at least be larger."""
    wanted: bool | None = field(default=None, kw_only=True)
    """The verdict on a labelled completion (segment 1, after its prompt); None for samples that are not judged."""

    @property
    def tokens(self) -> int:
        """Tokens of the tree, a shared prefix counted once."""
        return sum(len(segment.tokens_T) for segment in self.segments)

    @property
    def weight(self) -> float:
        return float(sum(float(segment.weights_T.sum()) for segment in self.segments))

    @property
    def longest_path(self) -> int:
        """Tokens from the root to the farthest leaf."""
        depth: list[int] = []
        for segment in self.segments:
            depth.append(len(segment.tokens_T) + (depth[segment.parent] if segment.parent >= 0 else 0))
        return max(depth)

    def leaves(self) -> list[int]:
        parents = {segment.parent for segment in self.segments}
        return [index for index in range(len(self.segments)) if index not in parents]

    def weighed_at_ends(self, *, pad_id: int | None = None) -> Sample:
        """The same tree, weighing 1 at the last token of each leaf and 0 elsewhere: where a reward model's score is read.

        `pad_id`: such tokens at a leaf's end are passed over, if it has others.
        """
        leaves = set(self.leaves())
        segments = []
        for index, segment in enumerate(self.segments):
            weights_T = np.zeros(len(segment.tokens_T), np.float32)
            if index in leaves:
                real = np.flatnonzero(segment.tokens_T != pad_id) if pad_id is not None else np.zeros(0, np.int64)
                weights_T[int(real[-1]) if len(real) else -1] = 1.0
            segments.append(replace(segment, weights_T=weights_T))
        return replace(self, segments=tuple(segments))

    def ancestry(self, index: int) -> list[int]:
        """Segment indices from the root to `index`."""
        path = [index]
        while (parent := self.segments[path[-1]].parent) >= 0:
            path.append(parent)
        return path[::-1]

    def path(self, leaf: int) -> tuple[Tokens, Weights]:
        """Tokens and weights from the root to a leaf, as the model sees them alone."""
        chain = [self.segments[index] for index in self.ancestry(leaf)]
        return np.concatenate([s.tokens_T for s in chain]), np.concatenate([s.weights_T for s in chain])


def single(row_id: str, tokens: Sequence[int] | Tokens, weights: Sequence[float] | Weights) -> Sample:
    """A sample with one path. Its first token weighs nothing, since nothing predicts it."""
    weights_T = np.array(weights, np.float32)
    weights_T[:1] = 0.0
    return Sample(row_id, (Segment(np.asarray(tokens, np.int32), weights_T),))


def common_prefix(a: Tokens, b: Tokens, start: int = 0) -> int:
    """How many tokens both begin with. The first `start` are known to be the same."""
    length = min(len(a), len(b))
    differ = np.flatnonzero(a[start:length] != b[start:length])
    return start + int(differ[0]) if len(differ) else length


def merge_paths(row_id: str, paths: Sequence[tuple[Tokens, Weights]]) -> Sample:
    """The tree of several paths: prefixes with equal tokens stand once.

    Where two paths share a token, its weight is the larger one: the turn trained on one path is context on the next. The first
    token weighs nothing, since nothing predicts it.
    """
    if len(paths) == 1:
        return single(row_id, *paths[0])
    segments: list[Segment] = []

    def grow(group: list[int], start: int, parent: int) -> None:
        first = paths[group[0]][0]
        end = min(common_prefix(first, paths[i][0], start) for i in group)
        if end > start or parent < 0:
            weights = np.max(np.stack([paths[i][1][start:end] for i in group]), axis=0) if end > start else np.zeros(0)
            weights_T = np.array(weights, np.float32)
            weights_T[: int(start == 0)] = 0.0
            segments.append(Segment(first[start:end].astype(np.int32), weights_T, parent))
            parent = len(segments) - 1
        branches: dict[int, list[int]] = {}
        for i in group:
            if end < len(paths[i][0]):
                branches.setdefault(int(paths[i][0][end]), []).append(i)
        for branch in branches.values():
            grow(branch, end, parent)

    grow(list(range(len(paths))), 0, -1)
    return Sample(row_id, tuple(segments))
