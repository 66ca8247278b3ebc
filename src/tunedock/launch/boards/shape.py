"""A dashboard as rows of panels, and the same as Grafana's JSON.

Panels stand from left to right, and begin a new line where the 24 columns are full. Every text a reader sees goes through `say`,
so that a board in another language is the same board.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

COLUMNS = 24
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
"""Of a variable: a board that is imported somewhere else asks the Prometheus that is there."""
EVERY = {"text": "All", "value": "$__all"}

Unit = Literal["", "s", "bytes", "percent", "percentunit", "reqps", "ops"]
"""As Grafana names them: `percentunit` is a share of 1, `reqps` requests a second, `ops` others a second; empty: a number."""
Say = Callable[[str], str]


@dataclass(frozen=True, slots=True)
class Query:
    expr: str
    legend: str
    """Labels, as `{{model}}`."""
    what: str = ""
    """A word before them, where a panel shows several things."""


@dataclass(frozen=True, slots=True)
class Panel:
    title: str
    queries: Sequence[Query]
    unit: Unit = ""
    kind: Literal["timeseries", "stat"] = "timeseries"
    width: int = 12
    height: int = 8
    about: str = ""
    stacked: bool = False
    logarithmic: bool = False
    between: tuple[float, float] | None = None
    """The axis's ends, where the figure has them."""
    text: Literal["value", "name", "value_and_name"] = "value"
    """Of a `stat`: what it shows."""


@dataclass(frozen=True, slots=True)
class Row:
    """`title`: None for panels that stand without a heading."""

    title: str | None
    panels: Sequence[Panel]


@dataclass(frozen=True, slots=True)
class Variable:
    """A choice above the board: the values of a label."""

    name: str
    label: str
    query: str


@dataclass(frozen=True, slots=True)
class Board:
    uid: str
    title: str
    rows: Sequence[Row]
    variables: Sequence[Variable]
    refresh: str


def as_json(board: Board, say: Say, *, language: str = "") -> dict[str, Any]:
    """`language`: part of the board's identity, so that two of them stand side by side; empty for English."""
    return {
        "uid": f"{board.uid}-{language}" if language else board.uid,
        "title": say(board.title),
        "tags": ["tunedock"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": board.refresh,
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_datasource(say), *(_variable(one, say) for one in board.variables)]},
        "panels": _panels(board.rows, say),
    }


def _datasource(say: Say) -> dict[str, Any]:
    return {"name": "datasource", "label": say("Data source"), "type": "datasource", "query": "prometheus"}


def _variable(one: Variable, say: Say) -> dict[str, Any]:
    return {
        "name": one.name,
        "label": say(one.label),
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": one.query, "refId": one.name},
        "refresh": 2,
        "includeAll": True,
        "allValue": ".*",  # also of what has the label empty, which no list of values names
        "multi": True,
        "current": EVERY,
    }


def _panels(rows: Sequence[Row], say: Say) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    x = y = tallest = 0
    for row in rows:
        x, y, tallest = 0, y + tallest, 0
        if row.title is not None:
            place = {"x": 0, "y": y, "w": COLUMNS, "h": 1}
            heading = {"type": "row", "title": say(row.title), "collapsed": False, "gridPos": place, "panels": []}
            found.append({"id": len(found) + 1, **heading})
            y += 1
        for panel in row.panels:
            if x + panel.width > COLUMNS:
                x, y, tallest = 0, y + tallest, 0
            place = {"x": x, "y": y, "w": panel.width, "h": panel.height}
            found.append({"id": len(found) + 1, **_panel(panel, place, say)})
            x, tallest = x + panel.width, max(tallest, panel.height)
    return found


def _panel(panel: Panel, place: dict[str, int], say: Say) -> dict[str, Any]:
    return {
        "type": panel.kind,
        "title": say(panel.title),
        **({"description": say(panel.about)} if panel.about else {}),
        "datasource": DATASOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": _defaults(panel), "overrides": []},
        "options": _options(panel),
        "targets": [
            {
                "datasource": DATASOURCE,
                "expr": one.expr,
                "legendFormat": _legend(one, say),
                "refId": chr(ord("A") + number),
            }
            for number, one in enumerate(panel.queries)
        ],
    }


def _legend(query: Query, say: Say) -> str:
    return f"{say(query.what)} {query.legend}".strip() if query.what else query.legend


def _defaults(panel: Panel) -> dict[str, Any]:
    found: dict[str, Any] = {"unit": panel.unit} if panel.unit else {}
    if panel.between is not None:
        found |= {"min": panel.between[0], "max": panel.between[1]}
    if panel.kind == "stat":
        return found
    drawn: dict[str, Any] = {"drawStyle": "line", "lineWidth": 1, "fillOpacity": 0, "showPoints": "never"}
    if panel.stacked:
        drawn |= {"fillOpacity": 30, "stacking": {"mode": "normal", "group": "A"}}
    if panel.logarithmic:
        drawn |= {"scaleDistribution": {"type": "log", "log": 10}}
    return found | {"custom": drawn}


def _options(panel: Panel) -> dict[str, Any]:
    if panel.kind == "stat":
        return {"reduceOptions": {"calcs": ["lastNotNull"]}, "textMode": panel.text}
    return {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}}
