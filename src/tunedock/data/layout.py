"""Samples -> rows of tokens. A row is what one call of the model takes.

A layout is a pure function of samples, budget and ranks, and a step's samples one of seed, epoch and step: any step can be laid out
at once, so resuming costs nothing. There are three, chosen by what the model takes (`model.policy` probes it):

- `tree` (`data.forest`): segments in depth-first order, a prefix shared by two or more samples of a row stands once. No padding;
- `packed`: every leaf's path on its own, one after the other. No padding, shared prefixes are computed again;
- `padded`: every leaf's path is a line of its own, lines of like length share a row and are filled up. The last resort.

Shapes: B lines of a row, T tokens of a line, S segments of a row, N chosen tokens of a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tunedock.data.forest import Node, Part, grow, parts
from tunedock.data.sample import Sample

Ints = NDArray[np.int64]
Kind = Literal["tree", "packed", "padded"]
Regime = Callable[[int], int]
"""Length of a path -> a number; paths of different numbers never share a row (RoPE that depends on a row's length)."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """The tokens of a row whose log-probability is asked for, in the order of the row.

    `line_N`, `position_N` is the place whose hidden state predicts the token (one before it on its path); `leaf_N` is the index
    among the leaves of its sample. A token that several leaves of a sample share is chosen once, for the first of them; one that
    several samples share, once for each of them.
    """

    line_N: Ints
    position_N: Ints
    token_N: Ints
    weight_N: NDArray[np.float32]
    sample_N: Ints
    """Index of the sample within the step."""
    leaf_N: Ints
    own_N: Ints
    """The token's own position in its line."""

    def __len__(self) -> int:
        return len(self.token_N)


@dataclass(frozen=True, slots=True)
class Tree:
    """The segments of a row of one line, in depth-first order: a segment's descendants stand right behind it."""

    start_S: Ints
    end_S: Ints
    parent_S: Ints
    """Index of the segment this one continues; -1 for a root."""

    def __len__(self) -> int:
        return len(self.start_S)

    @property
    def plain(self) -> bool:
        """No segment continues another: documents side by side."""
        return bool((self.parent_S < 0).all())

    def subtree_end_S(self) -> Ints:
        """Where the last descendant of each segment ends. A token sees an earlier one if and only if it stands before that end."""
        ends = self.end_S.copy()
        for index in range(len(self) - 1, -1, -1):
            parent = self.parent_S[index]
            if parent >= 0:
                ends[parent] = max(ends[parent], ends[index])
        return ends


@dataclass(frozen=True, slots=True)
class Row:
    """One call of the model."""

    input_ids_BT: Ints
    position_ids_BT: Ints
    mask_BT: NDArray[np.bool_]
    """True where a token stands, False where padding does."""
    chosen: Chosen
    tree: Tree | None = None
    """How the one line's tokens hang together; None where each line is one path (padded)."""

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


def lay_out(samples: Sequence[Sample], kind: Kind, *, budget_tokens: int, regime: Regime | None = None) -> list[Row]:
    """Rows of at most `budget_tokens` slots each (a single path may be longer: it is a row of its own).

    What asks for nothing (a path cut off from its weighted tokens, a sample without weight) makes no row.
    """
    if regime is not None:
        groups: dict[int, list[int]] = {}
        for number, sample in enumerate(samples):
            groups.setdefault(regime(sample.longest_path), []).append(number)
        if len(groups) > 1:
            return [
                _renumbered(row, np.asarray(members, np.int64))
                for _, members in sorted(groups.items())
                for row in lay_out([samples[i] for i in members], kind, budget_tokens=budget_tokens)
            ]
    if kind == "padded":
        rows = padded(samples, budget_tokens=budget_tokens)
    else:
        rows = tree_rows(samples, budget_tokens=budget_tokens, share=kind == "tree")
    return [row for row in rows if len(row.chosen)]


def over_ranks(rows: Sequence[Row], ranks: int) -> list[list[Row]]:
    """Every rank's rows, as many on each, filled up with rows that weigh nothing; large rows meet large ones.

    Ranks wait for each other at every row, so rows of like size go side by side.
    """
    ordered = sorted(rows, key=lambda row: -row.slots)
    ordered += [empty_row(line=bool(rows) and rows[0].tree is None)] * (-len(ordered) % ranks)
    return [ordered[rank::ranks] for rank in range(ranks)]


def for_ranks(lay_out: Callable[[int], list[Row]], budget_tokens: int, ranks: int) -> list[Row]:
    """Rows within the budget, in a number that `ranks` share evenly where that can be had: a rank without a row waits.

    `lay_out` makes rows of at most as many slots as it is given. Of the ways tried, the one whose ranks wait least is taken.
    """
    rows = lay_out(budget_tokens)
    if not len(rows) % ranks:
        return rows
    wanted = -(-len(rows) // ranks) * ranks
    even = sum(row.slots for row in rows) / wanted
    tried = [rows]
    for slack in SLACKS:
        made = lay_out(min(budget_tokens, math.ceil(even * slack)))
        if max(row.slots for row in made) <= max(row.slots for row in rows):
            tried.append(made)
        if len(made) == wanted:
            break
    return min(tried, key=lambda made: _steps_time(made, ranks))


SLACKS = (1.0, 1.05, 1.15, 1.3, 1.6)
"""How much larger than even rows may be, tried in turn: pieces that cannot be cut leave gaps."""


def _steps_time(rows: Sequence[Row], ranks: int) -> int:
    """Slots that all ranks wait for, one row after the other."""
    return sum(max(row.slots for row in side) for side in zip(*over_ranks(rows, ranks), strict=True))


def empty_row(*, line: bool = False) -> Row:
    """One token that nothing is asked of; as a `line` of its own among padded ones, or as a tree."""
    one = np.zeros((1, 1), np.int64)
    nothing = np.zeros(0, np.int64)
    chosen = Chosen(nothing, nothing, nothing, np.zeros(0, np.float32), nothing, nothing, nothing)
    tree = None if line else Tree(np.zeros(1, np.int64), np.ones(1, np.int64), np.full(1, -1, np.int64))
    return Row(one, one, np.ones((1, 1), np.bool_), chosen, tree)


def _renumbered(row: Row, members: Ints) -> Row:
    chosen = row.chosen
    moved = replace(chosen, sample_N=members[chosen.sample_N])
    return Row(row.input_ids_BT, row.position_ids_BT, row.mask_BT, moved, row.tree)


# -- tree and packed ---------------------------------------------------------------------------------------------------


def tree_rows(samples: Sequence[Sample], *, budget_tokens: int, share: bool = True) -> list[Row]:
    """Rows without padding, of even size, as few as the budget allows. `share`: a common prefix stands once."""
    nodes = grow(samples, share=share)
    pieces = parts(nodes, budget_tokens)
    return [_tree_row(nodes, row) for row in _even(pieces, budget_tokens)]


def _even(pieces: list[Part], budget_tokens: int) -> list[list[Part]]:
    """Pieces in as few rows as first-fit-decreasing needs, then spread so that the rows are alike: the largest sets the memory."""
    ordered = sorted(pieces, key=lambda part: (-part.tokens, part.nodes[0]))
    packed: list[list[Part]] = []
    for part in ordered:
        fitting = (row for row in packed if _tokens(row) + part.tokens <= budget_tokens)
        row = next(fitting, None)
        if row is None:
            packed.append(row := [])
        row.append(part)
    spread: list[list[Part]] = [[] for _ in packed]
    for part in ordered:
        min(spread, key=_tokens).append(part)
    within = all(len(row) == 1 or _tokens(row) <= budget_tokens for row in spread)
    return spread if within else packed


def _tokens(row: list[Part]) -> int:
    return sum(part.tokens for part in row)


def _tree_row(nodes: Sequence[Node], row: Sequence[Part]) -> Row:
    tokens: list[NDArray[np.int32]] = []
    positions: list[Ints] = []
    starts: list[int] = []
    parents: list[int] = []
    chosen: list[tuple[Ints, Ints, Ints, NDArray[np.float32], Ints, Ints]] = []
    at = 0
    for part in row:
        place: dict[int, int] = {}  # node -> segment of this row
        for number in part.nodes:
            node = nodes[number]
            parent = place.get(node.parent, -1)
            place[number] = len(starts)
            before = starts[parent] + len(tokens[parent]) - 1 if parent >= 0 else -1
            for target in node.targets if number in part.counted else ():
                (where,) = np.nonzero(target.weights_T)
                where = where[where + node.depth > 0]  # nothing predicts the first token
                predecessor = np.where(where > 0, at + where - 1, before)
                same = np.full(len(where), target.sample), np.full(len(where), target.leaf)
                found = node.tokens_T[where].astype(np.int64), same[0], target.weights_T[where], same[1]
                chosen.append((predecessor, *found, at + where))
            starts.append(at)
            parents.append(parent)
            tokens.append(node.tokens_T)
            positions.append(node.depth + np.arange(len(node.tokens_T)))
            at += len(node.tokens_T)
    places = [np.concatenate(column) for column in zip(*chosen, strict=True)] if chosen else [np.zeros(0)] * 6
    order = np.argsort(places[0], kind="stable")
    position_N, token_N, sample_N, weight_N, leaf_N, own_N = [column[order] for column in places]
    start_S = np.asarray(starts, np.int64)
    return Row(
        input_ids_BT=np.concatenate(tokens).astype(np.int64)[None],
        position_ids_BT=np.concatenate(positions)[None],
        mask_BT=np.ones((1, at), np.bool_),
        chosen=Chosen(
            line_N=np.zeros(len(order), np.int64),
            position_N=position_N.astype(np.int64),
            token_N=token_N.astype(np.int64),
            weight_N=weight_N.astype(np.float32),
            sample_N=sample_N.astype(np.int64),
            leaf_N=leaf_N.astype(np.int64),
            own_N=own_N.astype(np.int64),
        ),
        tree=Tree(start_S, np.append(start_S[1:], at), np.asarray(parents, np.int64)),
    )


# -- padded ------------------------------------------------------------------------------------------------------------


def padded(samples: Sequence[Sample], *, budget_tokens: int) -> list[Row]:
    """Lines are sorted by length first, which keeps padding low and makes the result independent of the samples' order."""
    lines = grow(samples, share=False)
    lines.sort(key=lambda line: (-len(line.tokens_T), line.targets[0].sample, line.targets[0].leaf))
    rows: list[Row] = []
    start = 0
    while start < len(lines):
        width = len(lines[start].tokens_T)
        height = max(1, budget_tokens // max(width, 1))
        rows.append(_padded_row(lines[start : start + height], width))
        start += height
    return rows


def _padded_row(lines: list[Node], width: int) -> Row:
    shape = (len(lines), width)
    input_ids_BT = np.zeros(shape, np.int64)
    mask_BT = np.zeros(shape, np.bool_)
    weights_BT = np.zeros(shape, np.float32)
    for i, line in enumerate(lines):
        length = len(line.tokens_T)
        input_ids_BT[i, :length] = line.tokens_T
        mask_BT[i, :length] = True
        weights_BT[i, :length] = line.targets[0].weights_T
    weights_BT[:, :1] = 0.0  # nothing predicts the first token
    position_ids_BT = np.broadcast_to(np.arange(width), shape) * mask_BT
    line_N, place_N = np.nonzero(weights_BT)
    chosen = Chosen(
        line_N=line_N,
        position_N=place_N - 1,
        token_N=input_ids_BT[line_N, place_N],
        weight_N=weights_BT[line_N, place_N],
        sample_N=np.asarray([line.targets[0].sample for line in lines], np.int64)[line_N],
        leaf_N=np.asarray([line.targets[0].leaf for line in lines], np.int64)[line_N],
        own_N=place_N,
    )
    return Row(input_ids_BT, position_ids_BT.astype(np.int64), mask_BT, chosen)
