"""A tree of segments -> blocks of queries, each with the ranges of keys it sees, and the shapes they are computed in.

A chain is a root and, from segment to segment, the first child: it stands in one piece, and causal attention within it needs no
mask. Every other child begins a chain of its own, whose keys are its ancestors' ranges and itself.

Shapes: Q queries and M keys of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tunedock.data.layout import Tree

BLOCK_QUERIES = 256
"""Queries of a block at most, where its products are made one by one: causal attention computes what it then throws away only
within a block. With a sliding window, blocks are cut too, so that keys far behind are not computed."""


GRANULE = 64
"""Sides of tiles, and lengths of rows on the CPU, are multiples of this: oneDNN prepares every new shape of a product for about a
millisecond, sixty of them a step where lengths are as they come (docs/decisions/0007)."""


@dataclass(frozen=True, slots=True)
class Block:
    start: int
    end: int
    """Queries, by index in the row."""
    keys: tuple[tuple[int, int], ...]
    """Ranges of the row in the order of the path; the last one ends with the last query."""
    first_position: int
    """Position, on its path, of the first query."""

    @property
    def seen(self) -> int:
        return sum(end - start for start, end in self.keys)

    @property
    def square(self) -> bool:
        """Keys and queries are the same tokens."""
        return self.keys == ((self.start, self.end),)


def blocks(tree: Tree, window: int | None = None, *, queries: int | None = None) -> list[Block]:
    """The row's blocks, in its order. `queries`: cut longer ones, even without a window."""
    made: list[Block] = []
    for start, end, before in _chains(tree):
        block = Block(start, end, _joined([*before, (start, end)]), sum(e - s for s, e in before))
        windowed = window is not None and block.seen > window
        if windowed or (queries is not None and end - start > queries):
            made += _cut(block, window, queries or max(window or 0, BLOCK_QUERIES))
        else:
            made.append(block)
    return made


@dataclass(frozen=True, slots=True)
class Tile:
    """A block as its products are computed: among neighbours whose results are thrown away."""

    start: int
    end: int
    """Queries, by index in the row; the block's are among them."""
    keys: tuple[tuple[int, int], ...]
    """Ranges of the row; the block's keys stand among them in one piece."""
    columns: int
    """Keys computed."""
    left: int
    """Keys in front of the block's."""
    block: Block

    @property
    def sizes(self) -> tuple[int, ...]:
        """As the kernels take them: queries, those in front of the block's, the block's; keys, those in front, the block's."""
        block = self.block
        queries = self.end - self.start, block.start - self.start, block.end - block.start
        return *queries, self.columns, self.left, block.seen


def tile(block: Block, tokens: int, granule: int = GRANULE) -> Tile:
    """The block with its sides rounded up, within a row of `tokens`; as it is in a row that is no multiple of `granule`."""
    if tokens % granule:
        return Tile(block.start, block.end, block.keys, block.seen, 0, block)
    queries, columns = _up(block.end - block.start, granule), _up(block.seen, granule)
    start = min(block.start, tokens - queries)
    if len(block.keys) > 1:
        keys, left = (*block.keys, (0, columns - block.seen)), 0
    else:
        first = min(block.keys[0][0], tokens - columns)
        keys, left = ((first, first + columns),), block.keys[0][0] - first
    return Tile(start, start + queries, keys, columns, left, block)


def width_of(tokens: int) -> int:
    """The length a row of `tokens` is filled up to: in steps of GRANULE, for long rows in steps of a sixteenth to an eighth."""
    return _up(tokens, max(GRANULE, 1 << max(tokens.bit_length() - 5, 0)))


def _up(size: int, granule: int) -> int:
    return -(-size // granule) * granule


def mask_of(block: Block, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """[Q, M] to add to the scores; None where causal attention over a square is all there is."""
    if block.square and (window is None or block.seen <= window):
        return None
    keys = torch.arange(
        block.first_position + block.end - block.start - block.seen, block.first_position + block.end - block.start
    )
    queries = torch.arange(block.first_position, block.first_position + block.end - block.start)
    distance_QM = queries[:, None] - keys[None, :]
    unseen_QM = distance_QM < 0
    if window is not None:
        unseen_QM |= distance_QM >= window
    return torch.zeros(unseen_QM.shape, dtype=dtype).masked_fill_(unseen_QM, -torch.inf).to(device)


def _chains(tree: Tree) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
    """Each chain's start and end in the row and the ranges of its ancestors, in the order of the row."""
    starts, ends, parents = tree.start_S.tolist(), tree.end_S.tolist(), tree.parent_S.tolist()
    first = 0
    for index in range(1, len(starts) + 1):
        if index < len(starts) and parents[index] == index - 1:
            continue  # the chain goes on: a first child stands right behind its parent
        before: list[tuple[int, int]] = []
        above = parents[first]
        while above >= 0:
            before.append((starts[above], ends[above]))
            above = parents[above]
        yield starts[first], ends[index - 1], before[::-1]
        first = index


def _cut(block: Block, window: int | None, step: int) -> Iterator[Block]:
    for start in range(block.start, block.end, step):
        end = min(start + step, block.end)
        before = block.seen - (block.end - start)
        unseen = 0 if window is None else max(before - (window - 1), 0)  # keys no query from `start` on sees
        yield Block(start, end, _trimmed(block.keys, unseen, end), block.first_position + start - block.start)


def _trimmed(keys: tuple[tuple[int, int], ...], drop: int, end: int) -> tuple[tuple[int, int], ...]:
    """The ranges without their first `drop` keys and without those of the last range from `end` on."""
    kept: list[tuple[int, int]] = []
    for index, (first, last) in enumerate(keys):
        until = end if index == len(keys) - 1 else last
        skip = min(drop, until - first)
        drop -= skip
        if first + skip < until:
            kept.append((first + skip, until))
    return tuple(kept)


def _joined(ranges: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Ranges that touch, as one."""
    joined: list[tuple[int, int]] = []
    for start, end in ranges:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return tuple(joined)
