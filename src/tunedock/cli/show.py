"""Events on a terminal: bars and a live line of training; a plain line now and then where no one watches.

Everything goes to standard error, so that standard output holds the result alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from tunedock.cli.text import one_line, printable
from tunedock.errors import DataError
from tunedock.events import Event
from tunedock.launch.watch import OnEvent

PLAIN_EVERY_S = 5.0
"""The least time between two plain lines of progress."""

_NUMBERS = (
    ("loss", "loss {:.4f}"),
    ("reward", "reward {:.3f}"),
    ("eval_loss", "eval loss {:.4f}"),
    ("eval_reward", "eval reward {:.3f}"),
    ("learning_rate", "lr {:.2e}"),
    ("tokens_per_second", "{:,.0f} tok/s"),
)
"""Metric -> how it stands in a line, in this order. Every metric is in `events.jsonl`."""


class TellingConsole(Console):
    """rich would end the process when the reader of its output is gone; whoever prints shall decide."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def console(*, stderr: bool = False) -> Console:
    """A console that takes text as text: no markup, no emoji codes, no highlighting, words never cut by width when piped."""
    made = TellingConsole(stderr=stderr, markup=False, emoji=False, highlight=False, soft_wrap=False)
    if not made.is_terminal:
        made.width = 200  # a file has no width; rich's 80 columns would cut names
    return made


@contextmanager
def display() -> Iterator[Callable[[Event], None]]:
    """What to hand to the pipeline as `on_event`."""
    target = console(stderr=True)
    if not target.is_terminal or target.is_dumb_terminal:
        yield PlainDisplay(target)
        return
    with _progress(target) as progress:
        yield LiveDisplay(target, progress)


def judged(stage: Callable[[OnEvent], object]) -> tuple[dict[str, Any], DataError | None]:
    """The account a stage tells as its result, and the error it then ends with where the account is a bad one.

    Raises a DataError that comes before there is an account.
    """
    found: list[dict[str, Any]] = []
    with display() as tell:

        def collect(event: Event) -> None:
            if event["kind"] == "result" and isinstance(event.get("value"), dict):
                found.append(event["value"])
            tell(event)

        try:
            stage(collect)
        except DataError as error:
            if not found:
                raise
            return found[-1], error
    return found[-1], None


def metrics_line(event: Event) -> str:
    """`step 12  epoch 0.30  loss 1.2345  lr 1.00e-04  5,200 tok/s`."""
    values = event.get("values") or {}
    parts = [f"step {event.get('step', 0)}", f"epoch {event.get('epoch', 0.0):.2f}"]
    for name, form in _NUMBERS:
        if name in values:
            value = values[name]
            parts.append(f"{form.split()[0]} not a number" if value is None else form.format(value))
    return "  ".join(parts)


def say(target: Console, event: Event) -> bool:
    """Prints a note or a warning; whether the event was one."""
    if event["kind"] == "note":
        target.print(Text(printable(event.get("message", ""))))
    elif event["kind"] == "warning":
        where = event.get("where")
        target.print(
            Text.assemble(
                ("warning: ", "yellow"), f"{printable(where)}: " if where else "", printable(event.get("message", ""))
            )
        )
        if event.get("hint"):
            target.print(Text.assemble(("hint: ", "cyan"), printable(event["hint"])))
    else:
        return False
    return True


class PlainDisplay:
    """Lines for a log: each task's progress at most every few seconds and at its end, every evaluation, every note."""

    def __init__(self, target: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = target
        self._clock = clock
        self._spoken: dict[str, float] = {}
        self._began: dict[str, tuple[float, int]] = {}

    def __call__(self, event: Event) -> None:
        if say(self._console, event):
            return
        if event["kind"] == "progress":
            self._progress(event)
        elif event["kind"] == "metrics":
            evaluated = "eval_loss" in (event.get("values") or {})
            if evaluated or self._due("metrics"):
                self._console.print(Text(metrics_line(event)))

    def _progress(self, event: Event) -> None:
        task, done, total = event.get("task", ""), event.get("done", 0), event.get("total")
        now = self._clock()
        if done == 0:
            self._began[task] = (now, 0)  # a task may be done again: the next validation
            self._spoken[task] = now
            return
        began, first = self._began.setdefault(task, (now, done))
        if done != total and not self._due(task):
            return
        line = f"{one_line(task)}: {done:,}{f'/{total:,}' if total else ''} {one_line(event.get('unit', ''))}"
        if now - began >= 1.0 and done > first:  # of less time a rate would be noise
            rate = (done - first) / (now - began)
            line += f"  {rate:,.1f}/s"
            if total and total > done:
                line += f"  {duration((total - done) / rate)} left"
        self._console.print(Text(line))

    def _due(self, what: str) -> bool:
        now = self._clock()
        if now - self._spoken.get(what, float("-inf")) < PLAIN_EVERY_S:
            return False
        self._spoken[what] = now
        return True


class TrainingProgress(Progress):
    """Bars, and a line of their own for the numbers: behind a bar they would push it off a terminal of 80 columns."""

    numbers = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.numbers:
            yield Text(self.numbers, no_wrap=True, overflow="ellipsis")


class LiveDisplay:
    """A bar for each task, and below them the newest training numbers."""

    def __init__(self, target: Console, progress: TrainingProgress) -> None:
        self._console = target
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, event: Event) -> None:
        if say(self._console, event):
            return
        if event["kind"] == "progress":
            self._advance(event)
        elif event["kind"] == "metrics":
            self._measure(event)

    def _advance(self, event: Event) -> None:
        task = self._task(event.get("task", ""), event.get("unit", ""))
        if event.get("done") == 0:
            self._progress.reset(task)
        self._progress.update(task, completed=event.get("done", 0), total=event.get("total"))

    def _measure(self, event: Event) -> None:
        self._progress.numbers = metrics_line(event)
        if "eval_loss" in (event.get("values") or {}):
            self._console.print(Text(metrics_line(event)))

    def _task(self, name: str, unit: str) -> TaskID:
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(one_line(name, 32), total=None, unit=one_line(unit))
        return self._tasks[name]


def duration(seconds: float | None) -> str:
    """`12s`, `3m 20s`, `1h 05m`, `2d 03h`."""
    if seconds is None:
        return "-"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d {whole % 86400 // 3600:02d}h"


def _progress(target: Console) -> TrainingProgress:
    columns: tuple[Any, ...] = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}", markup=False),
        _Rate(),
        TimeRemainingColumn(compact=True),
    )
    return TrainingProgress(*columns, console=target, transient=False, redirect_stdout=False, redirect_stderr=False)


class _Rate(TextColumn):
    def __init__(self) -> None:
        super().__init__("", markup=False)

    def render(self, task: Any) -> Text:
        return Text("" if task.speed is None else f"{task.speed:,.1f}/s", style="cyan")
