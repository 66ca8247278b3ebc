"""A rank of two that train a model is killed, or stopped, in the middle: named, and made good from the last checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from demo_training import assert_the_same, command, losses_alone
from tunedock.run.pulse import read_beat
from tunedock.run.ranks import RankFiles
from tunedock.run.record import Run

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    return losses_alone(tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize(
    ("number", "said"),
    [(signal.SIGKILL, "it was killed by SIGKILL"), (signal.SIGSTOP, "whose process is stopped")],
    ids=["killed", "stopped"],
)
def test_a_lost_rank_costs_the_steps_since_the_last_checkpoint_and_nothing_else(
    tmp_path: Path, alone: dict[int, float], number: signal.Signals, said: str
) -> None:
    run = Run(tmp_path / "run")
    line = command(tmp_path, "launch.processes=2", "launch.timeout_s=15")
    with subprocess.Popen(line, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as training:
        deadline = time.monotonic() + 300
        while (beat := read_beat(RankFiles(run.ranks, 1).pulse)) is None or beat.step < 8:
            assert training.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        os.kill(beat.pid, number)
        _, err = training.communicate(timeout=400)
    assert training.returncode == 0, err
    assert "rank 1 on " in err and said in err and "training goes on from step " in err
    assert_the_same(run, alone)
