from __future__ import annotations

import io
import os
import pty

import pytest
from rich.console import Console

from tunedock.cli.show import LiveDisplay, PlainDisplay, TellingConsole, _progress, display, duration, metrics_line


def plain(width=120):
    return Console(file=io.StringIO(), markup=False, emoji=False, highlight=False, width=width)


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_plain_progress_is_told_now_and_then_and_at_the_end():
    target, clock = plain(), Clock()
    tell = PlainDisplay(target, clock)
    for done in range(101):
        tell({"kind": "progress", "task": "tokenise", "done": done * 10, "total": 1000, "unit": "rows"})
        clock.now += 0.125
    lines = target.file.getvalue().splitlines()
    assert lines == [
        "tokenise: 400/1,000 rows  80.0/s  8s left",
        "tokenise: 800/1,000 rows  80.0/s  2s left",
        "tokenise: 1,000/1,000 rows  80.0/s",
    ]


def test_plain_metrics_are_told_now_and_then_but_every_evaluation_is():
    target, clock = plain(), Clock()
    tell = PlainDisplay(target, clock)
    for step in range(10):
        tell({"kind": "metrics", "step": step, "epoch": 0.0, "values": {"loss": 1.0}})
        clock.now += 1.0
    tell({"kind": "metrics", "step": 9, "epoch": 0.0, "values": {"eval_loss": 0.5}})
    assert target.file.getvalue().splitlines() == [
        "step 0  epoch 0.00  loss 1.0000",
        "step 5  epoch 0.00  loss 1.0000",
        "step 9  epoch 0.00  eval loss 0.5000",
    ]


def test_the_metrics_line_has_what_training_is_watched_by():
    values = {"learning_rate": 1e-4, "loss": 1.23456, "tokens_per_second": 5210.4, "grad_norm": 3.0}
    line = metrics_line({"kind": "metrics", "step": 12, "epoch": 0.3, "values": values})
    assert line == "step 12  epoch 0.30  loss 1.2346  lr 1.00e-04  5,210 tok/s"
    assert "loss not a number" in metrics_line({"kind": "metrics", "step": 1, "epoch": 0.0, "values": {"loss": None}})


def test_warnings_have_their_place_and_way_out_and_text_is_no_markup():
    target = plain()
    tell = PlainDisplay(target)
    tell({"kind": "warning", "message": "odd [red]rows[/red]\x1b[2J", "where": "a.jsonl:3", "hint": "look :smile:"})
    tell({"kind": "note", "message": "batch [b]16"})
    tell({"kind": "stage", "stage": "train", "state": "started"})
    tell({"kind": "future", "what": 1})
    assert target.file.getvalue().splitlines() == [
        "warning: a.jsonl:3: odd [red]rows[/red]",
        "hint: look :smile:",
        "batch [b]16",
    ]


def test_the_live_line_shows_step_rate_remaining_time_and_numbers():
    target = Console(
        file=io.StringIO(), force_terminal=True, width=80, markup=False, highlight=False, color_system=None
    )
    progress = _progress(target)
    progress.get_time = Clock()
    tell = LiveDisplay(target, progress)
    for step in range(1, 21):
        tell({"kind": "progress", "task": "training", "done": step, "total": 100, "unit": "steps"})
        tell({"kind": "metrics", "step": step, "epoch": step / 50, "values": {"loss": 2.5}})
        progress.get_time.now += 2.0
    target.print(progress.get_renderable())
    line = " ".join(target.file.getvalue().split())
    assert "20/100 steps 0.5/s" in line
    assert "02:40" in line
    assert "step 20 epoch 0.40 loss 2.5000" in line


def test_a_task_name_is_no_markup():
    target = Console(file=io.StringIO(), force_terminal=True, width=160, markup=False, color_system=None)
    progress = _progress(target)
    LiveDisplay(target, progress)(
        {"kind": "progress", "task": "[red]a[/x]\x1b[2J", "done": 1, "total": None, "unit": "[b]"}
    )
    target.print(progress.get_renderable())
    assert "[red]a[/x]" in target.file.getvalue()
    assert "[b]" in target.file.getvalue()


def test_a_pipe_gets_plain_lines_and_a_terminal_the_live_display(monkeypatch):
    with display() as tell:
        assert isinstance(tell, PlainDisplay)
    leader, follower = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    with os.fdopen(follower, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        with display() as tell:
            assert isinstance(tell, LiveDisplay)
    os.close(leader)


def test_a_closed_pipe_is_told_to_the_caller():
    class Closed(io.StringIO):
        def write(self, _text):
            raise BrokenPipeError

        flush = write

    with pytest.raises(BrokenPipeError):
        TellingConsole(file=Closed()).print("x")


@pytest.mark.parametrize(
    ("seconds", "shown"), [(None, "-"), (0.4, "0s"), (59.6, "1m 00s"), (3900, "1h 05m"), (183600, "2d 03h")]
)
def test_durations(seconds, shown):
    assert duration(seconds) == shown
