"""The figures of runs as Prometheus scrapes them, read from their run directories; nothing of it is in the training's way.

| metric | labels | what |
|---|---|---|
| `tunedock_run_status` | run, status | 1 at the status it has, 0 at the others |
| `tunedock_run_steps`, `tunedock_run_steps_planned` | run | optimizer steps done, and in all |
| `tunedock_run_metric` | run, name | what each figure was when it was last told (`loss`, `eval_loss`, `grad_norm`, `rewards/...`) |
| `tunedock_run_warnings_total`, `tunedock_run_failures_total` | run | events of that kind |
| `tunedock_run_last_event_timestamp_seconds` | run | when anything was last told: a run that works and is silent hangs |

Figures keep their own names as a label, for their names are open: a reward function may log any. One that was no number when it was
last told is NaN.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from tunedock.errors import DependencyError, RecipeError, RunError
from tunedock.events import Event, EventReader
from tunedock.run.record import Run, Status

PORT = 9400
STATUSES: tuple[str, ...] = get_args(Status)


@dataclass(slots=True)
class _Followed:
    """What a run has told so far."""

    run: Run
    reader: EventReader
    steps: tuple[int, int | None] | None = None
    figures: dict[str, float] = field(default_factory=dict)
    warnings: int = 0
    failures: int = 0
    last_event: float | None = None

    def read(self) -> None:
        for event in self.reader.new():
            self.last_event = float(event.get("time", 0.0))
            self._take(event)

    def _take(self, event: Event) -> None:
        match event["kind"]:
            case "metrics":
                told = event.get("values", {}).items()
                self.figures |= {name: math.nan if value is None else float(value) for name, value in told}
            case "progress" if event.get("unit") == "steps":
                self.steps = (int(event.get("done", 0)), event.get("total"))
            case "warning":
                self.warnings += 1
            case "failure":
                self.failures += 1


class RunsCollector:
    """What is registered with `prometheus_client`: each scrape reads what the runs have told since the one before."""

    def __init__(self, runs: Callable[[], Sequence[Run]]) -> None:
        """`runs`: those there are at a scrape."""
        self._runs = runs
        self._followed: dict[str, _Followed] = {}
        self._lock = threading.Lock()  # two scrapes may come at once

    def describe(self) -> list[Any]:
        """Nothing is read when it is registered."""
        return []

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        status = GaugeMetricFamily("tunedock_run_status", "1 at the status a run has.", labels=["run", "status"])
        done = GaugeMetricFamily("tunedock_run_steps", "Optimizer steps done.", labels=["run"])
        planned = GaugeMetricFamily("tunedock_run_steps_planned", "Optimizer steps in all.", labels=["run"])
        figures = GaugeMetricFamily("tunedock_run_metric", "A figure when last told.", labels=["run", "name"])
        warnings = CounterMetricFamily("tunedock_run_warnings", "Warnings told.", labels=["run"])
        failures = CounterMetricFamily("tunedock_run_failures", "Failures told.", labels=["run"])
        last = GaugeMetricFamily(
            "tunedock_run_last_event_timestamp_seconds", "When the run last told anything.", labels=["run"]
        )
        with self._lock:
            for name, one in self._read().items():
                now = _status(one.run)
                for known in STATUSES:
                    status.add_metric([name, known], float(known == now))
                if one.steps is not None:
                    done.add_metric([name], one.steps[0])
                    if one.steps[1] is not None:
                        planned.add_metric([name], one.steps[1])
                for figure, value in one.figures.items():
                    figures.add_metric([name, figure], value)
                warnings.add_metric([name], one.warnings)
                failures.add_metric([name], one.failures)
                if one.last_event is not None:
                    last.add_metric([name], one.last_event)
        yield from (status, done, planned, figures, warnings, failures, last)

    def _read(self) -> dict[str, _Followed]:
        """By name; of runs that are gone nothing is kept."""
        found = {run.name: run for run in self._runs()}
        self._followed = {
            name: self._followed.get(name) or _Followed(run, EventReader(run.events)) for name, run in found.items()
        }
        for one in self._followed.values():
            one.read()
        return self._followed


def _status(run: Run) -> str | None:
    try:
        return run.state().status
    except RunError:  # it is being deleted, or made
        return None


def serve(runs: Callable[[], Sequence[Run]], *, host: str, port: int) -> tuple[Any, threading.Thread]:
    """Starts to answer scrapes at `/metrics`; the server, and the thread it runs in. Its `shutdown()` ends it.

    Raises DependencyError without `prometheus-client`, RecipeError where the address cannot be listened on.
    """
    try:
        from prometheus_client import CollectorRegistry, start_http_server
    except ImportError as error:
        raise DependencyError(
            "Prometheus' client is not installed",
            where="tunedock runs metrics",
            hint="`pip install 'tunedock[prometheus]'`",
        ) from error
    registry = CollectorRegistry(auto_describe=False)
    registry.register(RunsCollector(runs))
    try:
        return start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise RecipeError(
            f"cannot listen on {host}:{port}: {error.strerror or error}", where="--listen", hint="give another port"
        ) from error
