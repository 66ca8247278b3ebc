"""What passes between those who make answers and those who score them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tunedock.data.conversation import Message

SKIPPED = "/skipped"
"""Ends the name of the metric of what a source has no say about."""

Values = list[float | None]
"""A score for each completion; None where a source has no say."""


@dataclass(frozen=True, slots=True)
class Completion:
    """An answer, for who scores it."""

    row_id: str
    """The prompt's row, for people."""
    prompt: tuple[Message, ...]
    text: str
    """Without the stop token and other special ones."""
    token_ids: tuple[int, ...]
    tools: tuple[dict[str, Any], ...] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)
    """The other fields of the prompt's row, as JSON values."""
    answer: str | None = None
    """The answer the row itself brings."""


def nothing() -> None:
    """The `check` of who is never stopped."""


@dataclass(frozen=True, slots=True)
class Moment:
    """When completions are scored."""

    step: int = 0
    """Optimizer steps done."""
    max_steps: int = 0
    check: Callable[[], None] = nothing
    """Called again and again while waiting; raises to stop."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Shapes: N completions."""

    total: list[float]
    """The weighted sum for each [N]."""
    parts: dict[str, Values]
    """By source, as each of them scored, without its weight [N]."""
    sums: dict[str, tuple[float, int]]
    """By metric: a sum, and what it is divided by. Those of parts of the completions add up to those of all."""
    extra: dict[str, list[Any]]
    """Columns [N] that reward functions logged by TRL's `log_extra`."""

    @property
    def metrics(self) -> dict[str, float]:
        """`rewards/<name>`: the mean over the completions it scored; `rewards/<name>/skipped`: the share it did not score, where
        there is any; and what reward functions logged by TRL's `log_metric`, its mean."""
        return means_of(self.sums)


def means_of(sums: Mapping[str, tuple[float, int]]) -> dict[str, float]:
    """Metrics of `Scores.sums`."""
    return {name: total / of for name, (total, of) in sums.items() if of and (total or not name.endswith(SKIPPED))}


@dataclass(slots=True)
class Log:
    """What functions say beside their scores, through TRL's `log_metric` and `log_extra`."""

    metrics: dict[str, list[float]] = field(default_factory=dict)
    extra: dict[str, list[Any]] = field(default_factory=dict)


class Source(Protocol):
    """One of the recipe's `rewards`."""

    def values(self, completions: Sequence[Completion], moment: Moment, log: Log) -> Values:
        """A finite number for each completion, or None where it has no say. Raises RewardError naming the row."""
        ...

    def lineage(self) -> dict[str, Any]:
        """What it is, for the run's record: enough to tell whether it has changed."""
        ...

    def close(self) -> None:
        """Lets go of connections. A call after it opens new ones."""
        ...
