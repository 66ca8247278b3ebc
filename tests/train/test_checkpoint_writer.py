"""Checkpoints beside training: steps change nothing of what is being written, failures come up, memory decides on the copy."""

from __future__ import annotations

import io
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_loop import build, weights
from tunedock.errors import DiskError, InterruptedRun
from tunedock.events import Emitter
from tunedock.train.checkpoint import Checkpoints, Snapshot
from tunedock.train.checkpoint_writer import CheckpointWriter
from tunedock.train.optimizer_state import optimizer_state, state_bytes
from tunedock.train.random_states import random_states


class Gated(Checkpoints):
    """A disk that takes its time: a save begins and goes on when the test lets it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, keep=None)
        self.begun, self.gate = threading.Event(), threading.Event()

    def save(self, snapshot: Snapshot, **how: Any) -> Path:
        self.begun.set()
        assert self.gate.wait(20)
        return super().save(snapshot, **how)


def writer(checkpoints: Checkpoints, spare: int = 1 << 30) -> tuple[CheckpointWriter, io.StringIO]:
    stream = io.StringIO()
    return CheckpointWriter(checkpoints, spare_bytes=lambda: spare, emit=Emitter(stream)), stream


def snapshot(step: int) -> Snapshot:
    return Snapshot(step, {"w": torch.full((3,), float(step))}, {}, {"feed": {}}, random_states())


def test_steps_that_follow_change_nothing_of_what_is_written(tmp_path: Path) -> None:
    """With momentum, a step count and whole weights, all of which a step changes in place."""
    loop, policy, _ = build(tmp_path, steps=9, save_steps=4, optim="adamw_torch")
    slow = Gated(tmp_path)
    loop.saver.writer = CheckpointWriter(slow, spare_bytes=lambda: 1 << 30, emit=Emitter(None))
    kept: dict[str, torch.Tensor] = {}
    states: dict[str, torch.Tensor] = {}

    def at_step_4(*_: Any, **__: Any) -> None:
        tensors, _ = loop.updater.optimizer_state(copy=True)
        kept.update(weights(policy))
        states.update(tensors)

    saved = loop.saver.writer.save

    def save(step: int, *arguments: Any, **how: Any) -> None:
        if step == 4:
            at_step_4()
        if step == 8:
            slow.gate.set()
        saved(step, *arguments, **how)

    loop.saver.writer.save = save  # type: ignore[method-assign]
    loop.run()
    read = Checkpoints(tmp_path, keep=None).load("step-00000004")
    for name, tensor in kept.items():
        assert torch.equal(tensor, read.trained[name]), name
        assert not torch.equal(tensor, weights(policy)[name])
    assert states.keys() == read.optimizer_tensors.keys()
    for name, tensor in states.items():
        assert torch.equal(tensor, read.optimizer_tensors[name]), name
    assert read.state["progress"]["step"] == 4


def test_a_second_save_waits_for_the_first(tmp_path: Path) -> None:
    slow = Gated(tmp_path)
    beside, _ = writer(slow)
    taken: list[int] = []

    def take(step: int) -> Snapshot:
        taken.append(step)
        return snapshot(step)

    beside.save(1, 100, lambda copy: take(1))
    assert slow.begun.wait(20)
    second = threading.Thread(target=lambda: beside.save(2, 100, lambda copy: take(2)))
    second.start()
    second.join(0.2)
    assert second.is_alive() and taken == [1]
    slow.gate.set()
    second.join(20)
    beside.wait()
    assert slow.names() == ["step-00000001", "step-00000002"]


def test_a_step_that_is_saved_is_not_saved_again(tmp_path: Path) -> None:
    beside, _ = writer(Checkpoints(tmp_path, keep=None))
    beside.save(1, 100, lambda copy: snapshot(1), metric=0.5, better=True)
    beside.save(1, 100, lambda copy: pytest.fail("taken twice"), beside=False)
    assert Checkpoints(tmp_path, keep=None).index().best == "step-00000001"


def test_what_the_thread_failed_with_comes_up_at_the_next_look(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    beside, _ = writer(Checkpoints(folder, keep=None))
    beside.save(1, 100, lambda copy: snapshot(1))
    beside.wait()
    shutil.move(folder, tmp_path / "elsewhere")
    folder.write_text("a file where the folder was")
    beside.save(2, 100, lambda copy: snapshot(2))
    with pytest.raises(DiskError, match="the checkpoint cannot be written"):
        beside.wait()
    assert Checkpoints(tmp_path / "elsewhere", keep=None).load_last(pytest.fail).step == 1
    beside.check()  # told once


def test_training_ends_with_a_failed_save_and_not_after_all_steps(tmp_path: Path) -> None:
    loop, _, _ = build(tmp_path / "run", steps=400, save_steps=2)
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").write_text("a file where the folder was")
    with pytest.raises(DiskError):
        loop.run()
    assert loop.progress.step < 400


def test_without_memory_for_a_copy_training_waits_and_says_so_once(tmp_path: Path) -> None:
    beside, stream = writer(Checkpoints(tmp_path, keep=None), spare=1000)
    copies: list[bool] = []

    def take(step: int, copy: bool) -> Snapshot:
        copies.append(copy)
        return snapshot(step)

    beside.save(1, 700, lambda copy: take(1, copy))
    beside.wait()
    for step in (2, 3):
        beside.save(step, 900, lambda copy, step=step: take(step, copy))  # type: ignore[misc]
        assert f"step-{step:08d}" in Checkpoints(tmp_path, keep=None).names()
    assert copies == [True, False, False]
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [event["data"]["size_bytes"] for event in events] == [900]
    assert "training waits" in events[0]["message"]


def test_what_training_failed_with_comes_before_what_the_writer_failed_with(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.write_text("a file where the folder was")
    beside, stream = writer(Checkpoints(folder, keep=None))
    with pytest.raises(ZeroDivisionError), beside:
        beside.save(1, 100, lambda copy: snapshot(1))
        raise ZeroDivisionError
    (event,) = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert event["kind"] == "warning" and "cannot be written" in event["message"]


def test_a_stop_waits_for_what_is_in_flight(tmp_path: Path) -> None:
    asked = iter([False] * 4 + [True] * 100)
    loop, _, _ = build(tmp_path, save_steps=2, stop=lambda: next(asked))
    with pytest.raises(InterruptedRun, match="a checkpoint is saved"):
        loop.run()
    checkpoints = Checkpoints(tmp_path, keep=None)
    assert checkpoints.load_last(pytest.fail).step == loop.progress.step
    assert not list(tmp_path.glob(".*"))


def test_the_size_is_known_before_anything_is_copied() -> None:
    layer = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(64)).sum().backward()
    optimizer.step()
    tensors, _ = optimizer_state(optimizer)
    assert state_bytes(optimizer) == sum(t.numel() * t.element_size() for t in tensors.values())
    assert state_bytes(optimizer) >= 2 * 4 * 64 * 65
