"""The forest of a step: its samples' segments with common prefixes merged, and how it is cut into parts that fit a budget.

Shapes: T tokens of a node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from tunedock.data.sample import Sample, common_prefix

MIN_SHARED = 32
"""Tokens two samples must have in common at their beginning before it stands once: a branch costs attention a call of its own."""


@dataclass(frozen=True, slots=True)
class Target:
    """What a sample asks of a node's tokens."""

    weights_T: NDArray[np.float32]
    sample: int
    leaf: int
    """The first of the sample's leaves that the node leads to."""


@dataclass(slots=True)
class Node:
    tokens_T: NDArray[np.int32]
    parent: int
    depth: int
    """Tokens before it on its path."""
    targets: list[Target] = field(default_factory=list)
    samples: set[int] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Part:
    """Nodes that go into a row together, in depth-first order: with each node all its ancestors."""

    nodes: tuple[int, ...]
    counted: frozenset[int]
    """Nodes whose targets this part answers; a prefix repeated in several parts is answered in the first."""
    tokens: int


def grow(samples: Sequence[Sample], *, share: bool) -> list[Node]:
    """The nodes of all samples, parents before children. With `share`, common beginnings of samples and leaves stand once."""
    nodes: list[Node] = []
    if not share:
        for number, sample in enumerate(samples):
            _paths(nodes, number, sample)
        return nodes
    keys = [sample.segments[0].tokens_T.astype(">u4").tobytes() for sample in samples]
    order = sorted(range(len(samples)), key=lambda i: (keys[i], i))
    common = [
        common_prefix(samples[a].segments[0].tokens_T, samples[b].segments[0].tokens_T) for a, b in pairwise(order)
    ]
    _merge(nodes, samples, order, common, parent=-1, depth=0)
    return nodes


def _merge(
    nodes: list[Node],
    samples: Sequence[Sample],
    order: Sequence[int],
    common: Sequence[int],
    *,
    parent: int,
    depth: int,
) -> None:
    """Adds samples sorted by their tokens, the first `depth` of which stand in `parent` already.

    `common[i]`: tokens that the i-th and the next sample have in common from their beginning.
    """
    first = 0
    for i in range(len(order)):
        if i < len(order) - 1 and common[i] >= depth + MIN_SHARED:
            continue
        group, between = order[first : i + 1], common[first:i]
        first = i + 1
        if len(group) == 1:
            _attach(nodes, group[0], samples[group[0]], parent, depth)
            continue
        end = min(between)
        root = samples[group[0]].segments[0]
        nodes.append(Node(root.tokens_T[depth:end], parent, depth))
        here = len(nodes) - 1
        for number in group:
            weights_T = samples[number].segments[0].weights_T[depth:end]
            if weights_T.any():
                nodes[here].targets.append(Target(weights_T, number, 0))
            nodes[here].samples.add(number)
        _merge(nodes, samples, group, between, parent=here, depth=end)


def _attach(nodes: list[Node], number: int, sample: Sample, parent: int, shared: int) -> None:
    """Adds a sample's segments; the root's first `shared` tokens stand in `parent`."""
    place: dict[int, int] = {}
    first_leaf = _first_leaves(sample)
    for index, segment in enumerate(sample.segments):
        skip = shared if index == 0 else 0
        above = parent if segment.parent < 0 else place[segment.parent]
        if skip == len(segment.tokens_T):  # nothing is left of it: its children continue what stands already
            place[index] = above
            continue
        depth = 0 if above < 0 else nodes[above].depth + len(nodes[above].tokens_T)
        node = Node(segment.tokens_T[skip:], above, depth, samples={number})
        node.targets.append(Target(segment.weights_T[skip:], number, first_leaf[index]))
        nodes.append(node)
        place[index] = len(nodes) - 1


def _paths(nodes: list[Node], number: int, sample: Sample) -> None:
    """Adds each leaf's path as a node of its own; a segment that leaves share is answered on the first."""
    counted: set[int] = set()
    for leaf_number, leaf in enumerate(sample.leaves()):
        chain = sample.ancestry(leaf)
        segments = [sample.segments[i] for i in chain]
        weights = [
            np.zeros_like(segment.weights_T) if i in counted else segment.weights_T
            for i, segment in zip(chain, segments, strict=True)
        ]
        counted.update(chain)
        node = Node(np.concatenate([s.tokens_T for s in segments]), -1, 0, samples={number})
        node.targets.append(Target(np.concatenate(weights), number, leaf_number))
        nodes.append(node)


def _first_leaves(sample: Sample) -> dict[int, int]:
    """Segment -> index, among the sample's leaves, of the first that it leads to."""
    first: dict[int, int] = {}
    for leaf_number, leaf in enumerate(sample.leaves()):
        for index in sample.ancestry(leaf):
            first.setdefault(index, leaf_number)
    return first


# -- cutting -----------------------------------------------------------------------------------------------------------


def parts(nodes: Sequence[Node], budget_tokens: int) -> list[Part]:
    """Each tree of the forest whole where it fits the budget; else cut between samples, and a sample too large between leaves.

    What a cut divides keeps its prefix in every part. A single path longer than the budget is a part of its own.
    """
    children: dict[int, list[int]] = {}
    size = [len(node.tokens_T) for node in nodes]
    total = list(size)
    for index in range(len(nodes) - 1, -1, -1):
        if nodes[index].parent >= 0:
            total[nodes[index].parent] += total[index]
    for index, node in enumerate(nodes):
        children.setdefault(node.parent, []).append(index)
    for (
        siblings
    ) in children.values():  # the largest child goes first: attention runs through it with its parent in one piece
        siblings.sort(key=lambda i: (-total[i], i))
    made: list[Part] = []
    for root in sorted(children.get(-1, [])):
        leaves = _leaves_in_order(children, root)
        if total[root] <= budget_tokens:
            whole = _depth_first(children, root)
            made.append(Part(tuple(whole), frozenset(whole), total[root]))
        else:
            made += _cut(nodes, size, leaves, budget_tokens)
    return made


def _cut(nodes: Sequence[Node], size: Sequence[int], leaves: Sequence[int], budget_tokens: int) -> list[Part]:
    made: list[Part] = []
    answered: set[int] = set()
    current: list[int] = []
    tokens = 0

    def close() -> None:
        nonlocal current, tokens
        if current:
            counted = frozenset(current) - answered
            answered.update(counted)
            made.append(Part(tuple(current), counted, tokens))
        current, tokens = [], 0

    def missing(group: Sequence[int]) -> list[int]:
        have, wanted = set(current), []
        for leaf in group:
            chain = []
            while leaf >= 0 and leaf not in have:
                chain.append(leaf)
                have.add(leaf)
                leaf = nodes[leaf].parent
            wanted += chain[::-1]
        return wanted

    def place(group: Sequence[int]) -> bool:
        nonlocal tokens
        wanted = missing(group)
        cost = sum(size[i] for i in wanted)
        if tokens + cost > budget_tokens:
            return False
        current.extend(wanted)
        tokens += cost
        return True

    for group in _by_sample(nodes, leaves):
        if place(group):
            continue
        close()
        if place(group):
            continue
        for leaf in group:  # the sample alone is too large
            if not place([leaf]):
                close()
                if not place([leaf]):  # one path is: a part of its own
                    wanted = missing([leaf])
                    current.extend(wanted)
                    tokens = sum(size[i] for i in wanted)
    close()
    return made


def _by_sample(nodes: Sequence[Node], leaves: Sequence[int]) -> list[list[int]]:
    """Leaves in depth-first order, those of one sample together. A leaf of several samples (they are equal) stands alone."""
    groups: list[list[int]] = []
    last: set[int] = set()
    for leaf in leaves:
        owners = nodes[leaf].samples
        if groups and len(owners) == 1 and owners == last:
            groups[-1].append(leaf)
        else:
            groups.append([leaf])
        last = owners
    return groups


def _depth_first(children: dict[int, list[int]], root: int) -> list[int]:
    order, stack = [], [root]
    while stack:
        node = stack.pop()
        order.append(node)
        stack += reversed(children.get(node, []))
    return order


def _leaves_in_order(children: dict[int, list[int]], root: int) -> list[int]:
    return [node for node in _depth_first(children, root) if node not in children]
