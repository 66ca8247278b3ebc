"""A chain killed in the middle, by the real command with real workers, and gone on with."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from project import write_project

from tunedock.run.record import Run

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]

STEPS = 16


def started(folder, *arguments):
    command = [sys.executable, "-m", "tunedock", "pipeline", "chain.yaml", "--dir", "runs", "--json", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finished(process):
    out, error = process.communicate(timeout=600)
    assert process.returncode == 0, error
    return {stage["name"]: stage for stage in json.loads(out)["stages"]}


def result(folder):
    return hashlib.sha256((folder / "exported" / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chain") / "whole"
    write_project(folder, steps=STEPS, save=3)
    finished(started(folder))
    return result(folder)


def until(condition, process=None):
    for _ in range(6000):  # a machine that does other things too takes its time
        if condition():
            return
        assert process is None or process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    raise AssertionError("this took too long")


def at_step(run, step):
    try:
        return any(json.loads(line).get("step", 0) >= step for line in run.events.read_text().splitlines())
    except (OSError, ValueError):
        return False


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_killed_with_its_worker(tmp_path, undisturbed, stage):
    write_project(tmp_path, steps=STEPS, save=3)
    process = started(tmp_path)
    run = Run(tmp_path / "runs" / stage)
    until(lambda: at_step(run, 5), process)
    os.kill(process.pid, signal.SIGKILL)
    os.kill(run.state().pid, signal.SIGKILL)
    process.wait()
    until(lambda: not run.locked())
    done = finished(started(tmp_path))
    assert done[stage]["action"] == "resume"
    assert {one["place"] for one in done.values()}
    assert not (tmp_path / "runs" / f"{stage}-2").exists()
    assert result(tmp_path) == undisturbed
    assert {one["action"] for one in finished(started(tmp_path)).values()} == {"skip"}


def test_killed_while_its_worker_goes_on(tmp_path, undisturbed):
    write_project(tmp_path, steps=STEPS, save=3)
    process = started(tmp_path)
    run = Run(tmp_path / "runs" / "sft")
    until(lambda: at_step(run, 2), process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert run.locked()
    done = finished(started(tmp_path))
    assert done["sft"]["why"] == "it is finished already"
    assert result(tmp_path) == undisturbed


def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path, undisturbed):
    write_project(tmp_path, steps=STEPS, save=3)
    process = started(tmp_path)
    run = Run(tmp_path / "runs" / "dpo")
    until(lambda: at_step(run, 4), process)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    error = json.loads(out)["error"]
    assert error["hint"] == "run the same command again to go on"
    assert error["message"].startswith("stage `dpo`")
    done = finished(started(tmp_path))
    assert (done["sft"]["action"], done["dpo"]["action"]) == ("skip", "resume")
    assert result(tmp_path) == undisturbed


def test_killed_at_any_moment(tmp_path, undisturbed):
    """Again and again, until a call comes through; each lives a little longer than the one before."""
    write_project(tmp_path, steps=STEPS, save=3)
    for lives_s in (1.0, 3.0, 6.0, 10.0, 15.0, 22.0):
        process = started(tmp_path)
        try:
            process.wait(timeout=lives_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    finished(started(tmp_path))
    assert result(tmp_path) == undisturbed
