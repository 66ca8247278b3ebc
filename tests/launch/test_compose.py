"""A training over containers of one machine, by compose: the losses of one process, and nothing left behind."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from test_docker_training import folder, losses, surroundings, whole

from engine_bed import Engine
from tunedock.errors import DependencyError
from tunedock.launch.compose import find_compose
from tunedock.run.record import Run

__all__ = ["folder", "whole"]

pytestmark = [
    pytest.mark.usefixtures("nothing_left"),
    pytest.mark.skipif(shutil.which("docker-compose") is None, reason="docker-compose is not installed here"),
]
TWO = ("launch.on=compose", "launch.nodes=2")

Tunedock = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def environment(folder: Path, engine: Engine, site_image: str) -> dict[str, str]:
    """With compose on the path, and no compiler."""
    (folder / "home").mkdir(exist_ok=True)
    own = folder / "bin"
    own.mkdir(exist_ok=True)
    compose = own / "docker-compose"
    if not compose.exists():
        compose.symlink_to(str(shutil.which("docker-compose")))
    found = surroundings(folder, engine)
    return {**found, "PATH": f"{found['PATH']}:{own}"}


@pytest.fixture
def tunedock(folder: Path, environment: dict[str, str]) -> Tunedock:
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tunedock", *arguments]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)

    return call


@pytest.mark.long
def test_two_nodes_give_the_losses_of_one_process(folder: Path, tunedock: Tunedock, whole: Run) -> None:
    done = tunedock("train", "r.yaml", *TWO, "train.output_dir=runs/two")
    assert done.returncode == 0, done.stderr[-3000:]
    run = Run(folder / "runs/two")
    assert losses(run) == pytest.approx(losses(whole), rel=1e-5)
    told = [json.loads(line) for line in run.events.read_text().splitlines()]
    assert any(event.get("data", {}).get("ranks") == 2 for event in told)
    assert "node-1" in (run.path / "compose.yaml").read_text()


@pytest.mark.long
def test_a_stop_saves_on_one_and_ends_all_and_the_run_goes_on(
    folder: Path, tunedock: Tunedock, whole: Run, environment: dict[str, str]
) -> None:
    run = Run(folder / "runs/stopped-two")
    command = [sys.executable, "-m", "tunedock", "train", "r.yaml", *TWO, f"train.output_dir={run.path}"]
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        until = time.monotonic() + 180
        while process.poll() is None and time.monotonic() < until and not any(run.checkpoints.glob("step-*")):
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        printed = process.communicate(timeout=120)[0].decode()
    finally:
        process.kill()
    assert process.returncode == 130, printed[-3000:]
    assert run.state().status == "interrupted"
    done = tunedock("train", "--resume", str(run.path))
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(run) == pytest.approx(losses(whole), rel=1e-5)


@pytest.mark.long
def test_a_written_file_trains_by_compose_alone(
    folder: Path, tunedock: Tunedock, whole: Run, environment: dict[str, str]
) -> None:
    """Nobody watches it: what ends by itself compose starts again, and the run is in its folder."""
    done = tunedock("train", "r.yaml", *TWO, "train.output_dir=runs/written", "--write")
    assert done.returncode == 0, done.stderr[-3000:]
    run = Run(folder / "runs/written")
    file = run.path / "compose.yaml"
    assert str(file) in done.stdout and run.state().status == "created"
    compose = ["docker-compose", "--file", str(file), "--project-name", "by-hand"]
    try:
        up = subprocess.run([*compose, "up"], env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert run.state().status == "finished", up.stdout[-3000:]
        assert losses(run) == pytest.approx(losses(whole), rel=1e-5)
    finally:
        subprocess.run([*compose, "down"], env=environment, capture_output=True, timeout=120, check=True)


@pytest.mark.long
def test_two_nodes_that_do_not_fit_are_refused(folder: Path, tunedock: Tunedock) -> None:
    done = tunedock("train", "r.yaml", *TWO, "train.output_dir=runs/large", "launch.container.memory=40g")
    assert (done.returncode, "memory: 40g" in done.stderr) == (2, True), done.stderr


def test_without_compose_the_way_out_is_told(tmp_path: Path) -> None:
    with pytest.raises(DependencyError, match="there is no compose here") as raised:
        find_compose({"PATH": str(tmp_path)})
    assert raised.value.where == "launch.on: compose"
