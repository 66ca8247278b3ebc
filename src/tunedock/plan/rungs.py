"""The sizes rows of tokens may have: the ladder of token budgets, where a run begins on it and where it ends."""

from __future__ import annotations

from collections.abc import Mapping

LADDER = (1, *sorted({size for power in range(6, 18) for size in (1 << power, 3 << (power - 1))} - {3 << 16}))
"""64, 96, 128, 192, ... 131072: a power of two, and one and a half times it; at the bottom 1, every path in a row of its own."""

LEAST_PLANNED = 256
"""No run begins with less; it goes lower only when memory runs out."""

MOST_TOKENS: Mapping[str, int] = {"cpu": 2048, "cuda": 32768}
"""Larger rows are no faster there."""

HEADROOM = 0.8
"""The share of what is free that is planned for: other processes grow, allocators fragment."""


def at_most(tokens: int) -> int:
    """The highest rung that is no more; the lowest when none is."""
    return max((rung for rung in LADDER if rung <= tokens), default=LADDER[0])


def at_least(tokens: int) -> int:
    """The lowest rung that is no less; the number itself above the ladder."""
    return next((rung for rung in LADDER if rung >= tokens), tokens)
