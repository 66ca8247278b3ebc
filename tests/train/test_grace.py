"""`launch.grace_s`: looked at before the first step, warned of once, and kept to when a SIGTERM comes."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from tiny_loop import build
from tunedock.errors import InterruptedRun, RecipeError
from tunedock.events import Emitter
from tunedock.train.checkpoint import Checkpoints
from tunedock.train.grace import Grace, bytes_per_second, require_time_to_save


def test_a_grace_shorter_than_a_save_is_refused_with_what_was_measured(tmp_path: Path) -> None:
    require_time_to_save(tmp_path, 1 << 20, 30)
    with pytest.raises(RecipeError) as caught:
        require_time_to_save(tmp_path, 1 << 50, 30)  # no disk of today takes a pebibyte in half a minute
    assert caught.value.where == "launch.grace_s: 30"
    assert "GiB and this disk takes" in caught.value.message
    assert "set `launch.grace_s: " in str(caught.value.hint)
    assert not list(tmp_path.iterdir())


def test_a_disk_is_measured_in_little_time(tmp_path: Path) -> None:
    assert bytes_per_second(tmp_path, 1 << 40) > 1 << 10


def test_a_save_longer_than_the_grace_is_warned_of_once() -> None:
    stream = io.StringIO()
    grace = Grace(10, lambda: None, Emitter(stream))
    for seconds in (3.0, 14.0, 15.0):
        grace.saved_in(seconds)
    (event,) = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert event["kind"] == "warning" and event["where"] == "launch.grace_s: 10"
    assert "14 s" in event["message"] and "launch.grace_s: 21" in event["hint"]


def test_no_save_is_begun_that_would_be_killed(tmp_path: Path) -> None:
    """Saves are known to take 5 s; 2 s are left when the stop is heard of."""
    asked = iter([False] * 5 + [True] * 100)
    grace = Grace(30, lambda: 2.0, Emitter(None))
    loop, _, _ = build(tmp_path, save_steps=2, stop=lambda: next(asked), grace=grace)
    grace.saved_in(5.0)
    with pytest.raises(InterruptedRun, match="stopped after step 5; saved is step 4") as caught:
        loop.run()
    assert "launch.grace_s" in str(caught.value.hint)
    assert Checkpoints(tmp_path, keep=None).load_last(pytest.fail).step == 4


@pytest.mark.parametrize("left", [None, 20.0])
def test_with_time_left_the_state_is_saved(tmp_path: Path, left: float | None) -> None:
    asked = iter([False] * 5 + [True] * 100)
    grace = Grace(30, lambda: left, Emitter(None))
    loop, _, _ = build(tmp_path, save_steps=2, stop=lambda: next(asked), grace=grace)
    grace.saved_in(5.0)
    with pytest.raises(InterruptedRun, match="stopped after step 5; a checkpoint is saved"):
        loop.run()
    assert Checkpoints(tmp_path, keep=None).load_last(pytest.fail).step == 5


def test_with_nothing_saved_yet_it_is_tried_all_the_same(tmp_path: Path) -> None:
    asked = iter([False] * 1 + [True] * 100)
    grace = Grace(30, lambda: 2.0, Emitter(None))
    loop, _, _ = build(tmp_path, save_steps=8, stop=lambda: next(asked), grace=grace)
    grace.saved_in(5.0)
    with pytest.raises(InterruptedRun, match="a checkpoint is saved"):
        loop.run()
