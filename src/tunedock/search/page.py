"""A search as one HTML file: parallel coordinates and the table. It asks nothing of the network and has no script.

A line is a trial, an axis a key; the last axis is the metric. Plotly would draw the same with 4 MB of script.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from tunedock.recipe.search import Dimension, Search

WIDTH, HEIGHT, LEFT, TOP = 1040, 420, 90, 60

STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #68707d; --line: #c9ced6; --ground: #fff; --best: #0a7d4f; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ee; --soft: #9aa3b0; --line: #3b4250; --ground: #14171c; --best: #4cc38a; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground); margin: 2rem auto; max-width: 1080px; }
svg { width: 100%; height: auto; } svg text { fill: var(--ink); font-size: 12px; } svg .tick { fill: var(--soft); font-size: 11px; }
.axis { stroke: var(--line); } .trial { fill: none; stroke-width: 1.6; opacity: .75; } .trial:hover { stroke-width: 4; opacity: 1; }
.pruned { stroke-dasharray: 4 4; opacity: .45; } .best { stroke: var(--best); stroke-width: 3.5; opacity: 1; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid var(--line); } tr.best td { font-weight: 600; }
.wide { overflow-x: auto; } p { color: var(--soft); }
"""


def page(found: Mapping[str, Any], search: Search) -> str:
    """The page for what `trials.json` holds."""
    policy = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    best = found["best"]
    said = (
        f"best {found['metric']} {best['value']:.6g} in trial {best['number']}" if best else "no trial is complete yet"
    )
    counts = ", ".join(
        f"{sum(row['state'] == state for row in found['trials'])} {state}"
        for state in ("complete", "pruned", "fail", "running")
        if any(row["state"] == state for row in found["trials"])
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'sha256-{policy}'\">"
        f"<title>Search</title><style>{STYLE}</style></head><body>"
        f"<h1>Search</h1><p>{escape(said)}; {escape(counts)}.</p>"
        f"{_chart(found, search)}<p>Dashed lines are pruned trials; failed ones are in the table alone.</p>"
        f"{_table(found, search)}</body></html>\n"
    )


def _chart(found: Mapping[str, Any], search: Search) -> str:
    rows = [row for row in found["trials"] if row["value"] is not None and math.isfinite(row["value"])]
    keys = list(search.space)
    if not rows:
        return ""
    low, high = min(row["value"] for row in rows), max(row["value"] for row in rows)
    step = (WIDTH - 2 * LEFT) / len(keys)
    places = [LEFT + step * index for index in range(len(keys) + 1)]
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="parallel coordinates of the trials">']
    for place, key in zip(places, [*keys, found["metric"]], strict=True):
        parts.append(f'<line class="axis" x1="{place:.1f}" x2="{place:.1f}" y1="{TOP}" y2="{HEIGHT - 30}"/>')
        parts.append(f'<text x="{place:.1f}" y="{TOP - 25}" text-anchor="middle">{escape(key)}</text>')
        ticks = _ticks(search.space[key]) if key in search.space else [(0.0, f"{low:.4g}"), (1.0, f"{high:.4g}")]
        for share, label in ticks:
            parts.append(f'<text class="tick" x="{place + 6:.1f}" y="{_y(share) + 4:.1f}">{escape(label[:24])}</text>')
    best = found["best"]
    for row in sorted(rows, key=lambda row: bool(best) and row["number"] == best["number"]):
        shares = [_share(search.space[key], row["values"].get(key)) for key in keys]
        shares.append((row["value"] - low) / (high - low) if high > low else 0.5)
        points = " ".join(f"{x:.1f},{_y(share):.1f}" for x, share in zip(places, shares, strict=True))
        is_best = best is not None and row["number"] == best["number"]
        kind = " best" if is_best else " pruned" if row["state"] != "complete" else ""
        told = ", ".join(f"{key} {_short(row['values'].get(key))}" for key in keys)
        good = 1 - shares[-1] if found["direction"] == "minimize" else shares[-1]
        parts.append(
            f'<polyline class="trial{kind}" stroke="hsl({20 + 190 * good:.0f} 65% 50%)" points="{points}">'
            f"<title>trial {row['number']}: {escape(told)}; {escape(found['metric'])} {row['value']:.6g}</title></polyline>"
        )
    return "".join([*parts, "</svg>"])


def _table(found: Mapping[str, Any], search: Search) -> str:
    keys = list(search.space)
    heads = "".join(f"<th>{escape(name)}</th>" for name in ["trial", "state", found["metric"], "step", *keys, ""])
    lines = []
    for row in sorted(found["trials"], key=lambda row: _order(row, found["direction"])):
        cells = [row["number"], row["state"], row["value"], row["step"], *(row["values"].get(key) for key in keys)]
        cells.append(row["why"] or "")
        mark = ' class="best"' if found["best"] and row["number"] == found["best"]["number"] else ""
        lines.append(f"<tr{mark}>" + "".join(f"<td>{escape(_short(cell))}</td>" for cell in cells) + "</tr>")
    return f'<div class="wide"><table><tr>{heads}</tr>{"".join(lines)}</table></div>'


def _order(row: Mapping[str, Any], direction: str) -> tuple[bool, float]:
    value = row["value"]
    if value is None or not math.isfinite(value):
        return True, 0.0
    return row["state"] != "complete", value if direction == "minimize" else -value


def _share(dimension: Dimension, value: Any) -> float:
    """Where on its axis a value stands, from 0 at the foot to 1."""
    if dimension.choice is not None:
        return dimension.choice.index(value) / (len(dimension.choice) - 1) if value in dimension.choice else 0.0
    if value is None:
        return 0.0
    low, high = dimension.low, dimension.high
    if dimension.log_uniform is not None:
        low, high, value = math.log(low), math.log(high), math.log(value)
    return float((value - low) / (high - low))


def _ticks(dimension: Dimension) -> Sequence[tuple[float, str]]:
    if dimension.choice is not None:
        return [(_share(dimension, value), _short(value)) for value in dimension.choice]
    return [(0.0, _short(dimension.low)), (1.0, _short(dimension.high))]


def _y(share: float) -> float:
    return HEIGHT - 30 - share * (HEIGHT - 30 - TOP)


def _short(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.5g}"
    return value if isinstance(value, str) else json.dumps(value)
