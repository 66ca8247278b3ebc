"""Two nodes of one training: two launchers on this machine, their processes real, met at an address of the loopback.

What they train is a sum over all ranks (tests/launch/ranks_worker.py); tests/launch/test_two_machines.py trains a model.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tunedock import pipeline
from tunedock.errors import DataError, LostPeerError, RecipeError, TunedockError
from tunedock.events import Event
from tunedock.launch.job import Job, JobSpec
from tunedock.launch.local import LocalLauncher
from tunedock.launch.meeting import free_port
from tunedock.pipeline.nodes import commands_elsewhere
from tunedock.recipe.launch import Launch
from tunedock.run.pulse import read_beat
from tunedock.run.ranks import RankFiles
from tunedock.run.record import Run

WORKER = [sys.executable, str(Path(__file__).parents[1] / "launch" / "ranks_worker.py")]


class Asking(LocalLauncher):
    """Has the worker do what the test asks, which no command of tunedock's says."""

    def __init__(self, request: dict[str, Any]) -> None:
        super().__init__(WORKER)
        self._request = request

    def start(self, spec: JobSpec) -> Job:
        return super().start(JobSpec(spec.stage, spec.run, {**self._request, **spec.request}, spec.launch))


class Node:
    """`tunedock train` on one machine."""

    def __init__(self, folder: Path, overrides: list[str], **request: Any) -> None:
        self.events: list[Event] = []
        self.outcome: Any = None
        self.error: TunedockError | None = None

        def train() -> None:
            try:
                self.outcome = pipeline.train(
                    [folder / "r.yaml"], overrides, on_event=self.events.append, launcher=Asking(request)
                )
            except TunedockError as error:
                self.error = error

        self._thread = threading.Thread(target=train)
        self._thread.start()

    def end(self, within_s: float = 120) -> TunedockError | None:
        self._thread.join(within_s)
        assert not self._thread.is_alive()
        return self.error

    def said(self) -> str:
        return "\n".join(str(event.get("message", "")) for event in self.events)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tunedock.launch.restart.FIRST_WAIT_S", 0.2)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n' * 4)
    port = free_port("127.0.0.1")
    (tmp_path / "r.yaml").write_text(
        f"model: some/model\ndata: {{train: rows.jsonl}}\n"
        f"launch: {{nodes: 2, processes: 1, rendezvous: '127.0.0.1:{port}', timeout_s: 20, grace_s: 5}}\n"
    )
    return tmp_path


def test_two_nodes_train_one_run(folder: Path) -> None:
    first = Node(folder, ["train.output_dir=run"], steps=3)
    second = Node(folder, ["launch.node_rank=1"])
    assert first.end() is None and second.end() is None
    assert first.outcome.value["ranks"] == 2 and second.outcome.value == {"node": 1}
    assert second.outcome.run == first.outcome.run == folder / "run", "they see the same disk"
    assert "on another machine: tunedock train" in first.said() and "launch.node_rank=1" in first.said()
    assert "shared with node 0" in second.said()
    assert Run(folder / "run").state().status == "finished"


@pytest.mark.long
def test_a_node_without_a_shared_disk_keeps_a_directory_of_its_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunedock.pipeline.nodes.shared_run", lambda start: None)
    first = Node(folder, ["train.output_dir=run"], steps=3)
    second = Node(folder, ["launch.node_rank=1", "train.output_dir=elsewhere/run"])
    assert first.end() is None and second.end() is None
    assert second.outcome.run == folder / "elsewhere" / "run"
    own = Run(second.outcome.run)
    assert own.state().status == "finished" and own.resolved()["hash"] == Run(first.outcome.run).resolved()["hash"]
    assert read_beat(RankFiles(own.ranks, 1).pulse) is not None
    assert not RankFiles(Run(first.outcome.run).ranks, 1).pulse.exists()


@pytest.mark.long
def test_a_node_that_fails_is_told_on_the_other(folder: Path) -> None:
    fault = {"rank": 1, "step": 20, "how": "raise"}
    first = Node(folder, ["train.output_dir=run"], steps=500, step_s=0.05, fault=fault)
    second = Node(folder, ["launch.node_rank=1"])
    for node in (first, second):
        error = node.end()
        assert type(error) is DataError and "a row of step 20 is none" in error.message, node.said()


@pytest.mark.long
def test_a_process_that_is_lost_on_one_node_is_made_good_by_both(folder: Path) -> None:
    fault = {"rank": 1, "step": 40, "how": "kill"}
    first = Node(folder, ["train.output_dir=run"], steps=80, step_s=0.05, fault=fault)
    second = Node(folder, ["launch.node_rank=1"])
    assert first.end() is None, first.said()
    assert second.end() is None, second.said()
    assert first.outcome.value["first"] == 40, "it went on where it was"
    assert "was killed by SIGKILL; this machine waits for node 0 to start again" in second.said()
    assert "was killed by SIGKILL; training goes on from" in first.said(), "node 0 names it too"


@pytest.mark.long
def test_a_node_that_is_gone_is_named_and_joins_again(folder: Path) -> None:
    first = Node(folder, ["train.output_dir=run", "launch.timeout_s=60"], steps=200, step_s=0.05)
    second = Node(folder, ["launch.node_rank=1", "launch.timeout_s=60"])
    file = RankFiles(folder / "run" / "ranks", 1).pulse
    deadline = time.monotonic() + 60
    while (beat := read_beat(file)) is None or beat.step < 20:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(beat.pid, signal.SIGKILL)
    assert first.end() is None, first.said()
    assert second.end() is None, second.said()
    assert first.outcome.value["first"] > 0


@pytest.mark.long
def test_another_recipe_is_refused(folder: Path) -> None:
    first = Node(folder, ["train.output_dir=run", "launch.timeout_s=4"], steps=3)
    second = Node(folder, ["launch.node_rank=1", "launch.timeout_s=4", "train.seed=7"])
    error = second.end()
    assert error is not None and "node 0 trains by another recipe" in error.message
    assert type(first.end()) is LostPeerError and "node 1 did not come" in str(first.error)


def test_the_other_machines_commands_are_said_in_full() -> None:
    launch = Launch(nodes=3, rendezvous="a:1")
    given = ["launch.nodes=3", "train.output_dir=a folder", "launch.node_rank=0"]
    assert commands_elsewhere(launch, [Path("r.yaml")], given) == [
        f"tunedock train r.yaml launch.nodes=3 'train.output_dir=a folder' launch.node_rank={node}" for node in (1, 2)
    ]


def test_a_resumed_run_may_have_other_processes_and_nothing_else(folder: Path) -> None:
    pipeline.create_run(pipeline.resolve_recipe([folder / "r.yaml"], ["train.output_dir=run", "train.batch_size=8"]))
    run = Run(folder / "run")
    with pytest.raises(RecipeError, match="keeps its recipe, but for where it is trained"):
        pipeline.train([], ["train.seed=7"], resume=run)
    ends_at_once = LocalLauncher([sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(DataError):
        pipeline.train([], ["launch.nodes=1", "launch.processes=1", "parallel=ddp"], resume=run, launcher=ends_at_once)
    told = run.resolved()
    assert told["recipe"]["launch"]["nodes"] == 1 and told["recipe"]["parallel"] == "ddp"
    assert told["origins"]["parallel"] == "command line"
    assert "parallel: ddp" in (run.path / "recipe.yaml").read_text()
