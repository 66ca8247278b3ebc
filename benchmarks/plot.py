"""Tokens a second of every side, a panel for each model and objective."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

from benchmarks.sides import OURS
from benchmarks.stats import Summary

matplotlib.use("Agg")  # no display is needed to write a file

OUR_COLOUR, BEST_COLOUR, OTHER_COLOUR = "#1f6feb", "#6e7781", "#c4cad1"


def plot(found: Sequence[Summary], path: Path) -> None:
    """Writes a PNG. Bars are medians; the thin lines reach from the slowest run to the fastest."""
    from matplotlib import pyplot

    keys = list(dict.fromkeys((summary.model_name, summary.objective) for summary in found))
    if not keys:
        return
    columns = min(len(keys), 2)
    lines = -(-len(keys) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(6.0 * columns, 3.2 * lines), squeeze=False)
    for place in axes.flat[len(keys) :]:
        place.set_visible(False)
    for place, key in zip(axes.flat, keys, strict=False):
        group = [summary for summary in found if (summary.model_name, summary.objective) == key]
        _panel(place, f"{key[1].upper()} LoRA, {key[0]}", sorted(group, key=lambda one: one.tokens_per_second))
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _panel(axes: matplotlib.axes.Axes, title: str, group: Sequence[Summary]) -> None:
    rates = [summary.tokens_per_second for summary in group]
    reach = [
        [summary.tokens_per_second - summary.low for summary in group],
        [summary.high - summary.tokens_per_second for summary in group],
    ]
    bars = axes.barh(
        [summary.name for summary in group],
        rates,
        xerr=reach,
        color=[_colour(summary) for summary in group],
        error_kw={"elinewidth": 1, "ecolor": "#24292f"},
    )
    axes.bar_label(bars, [f"{rate:,.0f}" for rate in rates], padding=6, fontsize=8)
    axes.set_xlim(0, max(summary.high for summary in group) * 1.18)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("real tokens a second", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _colour(summary: Summary) -> str:
    if summary.side == OURS:
        return OUR_COLOUR
    return OTHER_COLOUR if summary.variant == "default" else BEST_COLOUR
