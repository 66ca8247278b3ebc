"""A rule that spans sections of a recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tunedock.recipe.schema import Recipe


@dataclass(frozen=True, slots=True)
class Rule:
    name: str
    """Stable; tests and documentation refer to it."""
    keys: tuple[str, ...]
    """The keys it speaks about; the first is where the error points."""
    broken: Callable[[Recipe], bool]
    message: str
    hint: str
