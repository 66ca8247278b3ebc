"""What is aimed at, as ratios of medians, and whether it is met. Pure functions over summaries.

"Best" is the best figure of any peer in any configuration, "default" the best figure of any peer as its defaults have it: the
strictest reading of both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.sides import OURS
from benchmarks.stats import Summary

SPEED_TARGETS: dict[tuple[str, str], tuple[float, float]] = {
    ("tiny", "sft"): (2.5, 6.0),
    ("small", "sft"): (4.0, 8.0),
    ("tiny", "dpo"): (6.0, 8.0),
    ("small", "dpo"): (8.0, 8.0),
}
"""(model, objective) -> tokens/s against the best configuration of any peer, and against the fastest default: at least."""
MEMORY_FASTEST, MEMORY_FRUGAL, MEMORY_DEFAULT = 0.5, 1.0, 0.35
"""Peak memory above imports against the fastest peer's, the most frugal peer's, and the most frugal default's: at most."""
PREPROCESSING = 8.0
START_OVER_IMPORT = 1.25
MATMUL_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class Verdict:
    what: str
    ratio: float
    target: float
    at_least: bool

    @property
    def met(self) -> bool:
        return self.ratio >= self.target if self.at_least else self.ratio <= self.target


def verdicts(found: Sequence[Summary]) -> list[Verdict]:
    """For every model and objective in which we and a peer were measured."""
    results: list[Verdict] = []
    for key in dict.fromkeys((summary.model_name, summary.objective) for summary in found):
        group = [summary for summary in found if (summary.model_name, summary.objective) == key]
        ours = next((summary for summary in group if summary.side == OURS), None)
        peers = [summary for summary in group if summary.side != OURS]
        defaults = [summary for summary in peers if summary.variant == "default"]
        if ours is not None and peers:
            results += _speed(key, ours, peers, defaults) + _memory(key, ours, peers, defaults)
    return results


def fastest(found: Sequence[Summary]) -> Summary:
    return max(found, key=_rate)


def most_frugal(found: Sequence[Summary]) -> Summary:
    return min(found, key=_memory_of)


def _rate(summary: Summary) -> float:
    return summary.tokens_per_second


def _memory_of(summary: Summary) -> float:
    return summary.above_imports_bytes


def _speed(key: tuple[str, str], ours: Summary, peers: Sequence[Summary], defaults: Sequence[Summary]) -> list[Verdict]:
    best, default = SPEED_TARGETS[key]
    return _against(key, "tokens/s", _rate, ours, [("best", fastest(peers), best)], at_least=True) + (
        _against(key, "tokens/s", _rate, ours, [("default", fastest(defaults), default)], at_least=True)
        if defaults
        else []
    )


def _memory(
    key: tuple[str, str], ours: Summary, peers: Sequence[Summary], defaults: Sequence[Summary]
) -> list[Verdict]:
    beside = [("fastest", fastest(peers), MEMORY_FASTEST), ("most frugal", most_frugal(peers), MEMORY_FRUGAL)]
    if defaults:
        beside.append(("most frugal default", most_frugal(defaults), MEMORY_DEFAULT))
    return _against(key, "peak memory", _memory_of, ours, beside, at_least=False)


def _against(
    key: tuple[str, str],
    figure: str,
    value: Callable[[Summary], float],
    ours: Summary,
    beside: Sequence[tuple[str, Summary, float]],
    *,
    at_least: bool,
) -> list[Verdict]:
    model, objective = key
    return [
        Verdict(
            f"{objective} {model}: {figure} against the {role} ({peer.name})",
            value(ours) / value(peer),
            target,
            at_least,
        )
        for role, peer, target in beside
    ]
