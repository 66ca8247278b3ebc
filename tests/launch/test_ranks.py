"""Who hangs, and whose end is the start's: read off the files ranks leave, without a process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tunedock.errors import DiskError, LostPeerError
from tunedock.launch.ranks import COMING_UP_S, Watchman, is_stopped
from tunedock.launch.torchrun import Crew
from tunedock.recipe.launch import Launch
from tunedock.run.pulse import Beat
from tunedock.run.ranks import End, RankFiles, put
from tunedock.run.record import Run

LIMIT = 10.0


@pytest.fixture
def watchman(run: Run) -> Watchman:
    run.ranks.mkdir()
    return Watchman(run, Crew(Launch(processes=2, timeout_s=LIMIT), 2), now=0.0)


def beat(run: Run, rank: int, count: int, **changes: Any) -> None:
    told = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "step": 4,
        "what": "row",
        "written": count,
        "patient": False,
    }
    made = Beat(**{"rank": rank, "count": count, "age_s": 0.0, "waits": False, "time": 0.0, **told, **changes})
    put(RankFiles(run.ranks, rank).pulse, asdict(made))


def test_nobody_hangs_while_one_moves(run: Run, watchman: Watchman) -> None:
    for second in range(1, 30):
        beat(run, 0, 1, written=second)
        beat(run, 1, second)
        assert watchman.hanging(float(second)) == []


@pytest.mark.parametrize(
    ("first", "second", "hanging"),
    [
        ({"waits": True}, {}, [1]),
        ({}, {"waits": True}, [0]),
        ({"waits": True}, {"waits": True, "step": 3}, [1]),
        ({"waits": True}, {"waits": True}, [0, 1]),
        ({"waits": True}, {"patient": True}, []),
    ],
)
def test_who_waits_for_nobody_hangs(
    run: Run, watchman: Watchman, first: dict[str, Any], second: dict[str, Any], hanging: list[int]
) -> None:
    for now in (1.0, LIMIT + 0.5, LIMIT + 2.0):
        beat(run, 0, 7, written=int(now), **first)
        beat(run, 1, 7, written=int(now), **second)
        found = watchman.hanging(now)
        assert found == (hanging if now == LIMIT + 2.0 else [])


def test_a_process_whose_pulse_is_not_even_written_is_stopped_however_patient(run: Run, watchman: Watchman) -> None:
    beat(run, 0, 1)
    for second in range(1, 13):
        beat(run, 1, second)
        found = watchman.hanging(float(second))
    assert found == [0]


def test_a_process_that_has_died_does_not_hang(run: Run, watchman: Watchman) -> None:
    """torchrun ends the others, which may take longer than a short time-out."""
    with subprocess.Popen([sys.executable, "-c", "pass"]) as process:
        pass
    for now in (1.0, 15.0, 30.0):
        beat(run, 0, 1, waits=True, written=int(now))
        beat(run, 1, 1, pid=process.pid)
        assert watchman.hanging(now) == []


def test_coming_up_takes_longer(run: Run, watchman: Watchman) -> None:
    beat(run, 0, 1, patient=True)
    assert watchman.hanging(LIMIT) == []
    for now in (LIMIT + 5, COMING_UP_S + LIMIT + 1):
        beat(run, 0, 1, patient=True, written=int(now))
        found = watchman.hanging(now)
    assert found == [1]
    error = watchman.lost_by(found)
    assert error.message == "rank 1, which never came up: not moved for 10 s"


def test_one_that_is_left_alone_takes_its_time(run: Run, watchman: Watchman) -> None:
    """Rank 0 writes the result when the others have ended."""
    End(1, 0).write(run.ranks)
    for now in (1.0, 50.0):
        beat(run, 0, 5, written=int(now))
        assert watchman.hanging(now) == []


def ends(run: Run, *told: tuple[int, int, dict[str, Any] | None, float]) -> None:
    for rank, code, error, at in told:
        End(rank, code, error, "node-a", at).write(run.ranks)


LOST = {"kind": "LostPeerError", "message": "another process answers no more"}
FULL = {"kind": "DiskError", "message": "the disk is full", "where": "/data"}


def test_the_first_that_failed_by_itself_is_the_error(run: Run, watchman: Watchman) -> None:
    ends(run, (0, 13, LOST, 1.0), (1, 8, FULL, 2.0))
    error = watchman.cause("", killed_by_us=False)
    assert (
        type(error) is DiskError and error.message == "the disk is full (rank 1 on node-a)" and error.where == "/data"
    )
    ends(run, (0, 8, FULL, 3.0))
    error = watchman.cause("", killed_by_us=False)
    assert error is not None and error.message == "the disk is full", "what all say is nobody's in particular"


def test_one_that_left_no_word_was_killed(run: Run, watchman: Watchman) -> None:
    ends(run, (0, 13, LOST, 1.0))
    beat(run, 1, 3)
    account = "  rank      : {0} (local_rank: {0})\n  exitcode  : {1} (pid: 5)\n"
    summary = account.format(0, 13) + account.format(1, -9)
    error = watchman.cause("failed (exitcode: 13) local_rank: 0 (pid: 5) of binary: x\n" + summary, killed_by_us=False)
    assert type(error) is LostPeerError
    assert error.message == f"rank 1 on {socket.gethostname()}, last seen at step 5 (row): it was killed by SIGKILL"
    assert watchman.signal_of(summary) == 9 and watchman.signal_of("") is None
    assert watchman.cause(summary, killed_by_us=True) is None, "we know who did it"


def test_one_that_only_heard_is_not_blamed(run: Run, watchman: Watchman) -> None:
    ends(run, (0, 13, LOST, 1.0), (1, 143, {"kind": "PreemptedRun", "message": "stopped"}, 2.0))
    assert watchman.cause("", killed_by_us=False) is None
    assert watchman.heard() is not None


def test_a_machine_that_is_gone_is_named_with_its_ranks(run: Run) -> None:
    crew = Crew(Launch(nodes=2, processes=4, rendezvous="a:1"), 4)
    error = Watchman(run, crew).node_lost(1, "node-b")
    assert error.message == "node 1 (node-b) is gone, with ranks 4 to 7"
    assert "start it again there by the same command" in str(error.hint)


ASKED = """
import signal, sys
signal.signal(signal.SIGINT, lambda *_: sys.exit(5))
print("ready", flush=True)
signal.pause()
"""


def test_ranks_are_asked_past_torchrun_once_all_have_come_up(run: Run, watchman: Watchman) -> None:
    """torchrun would kill them after a while."""
    with subprocess.Popen([sys.executable, "-c", ASKED], stdout=subprocess.PIPE) as first:
        assert first.stdout is not None and first.stdout.readline() == b"ready\n"
        beat(run, 0, 1, pid=first.pid)
        assert not watchman.ask(signal.SIGINT) and first.poll() is None, "rank 1 is still coming up"
        End(1, 0).write(run.ranks)
        assert watchman.ask(signal.SIGINT)
        assert first.wait(20) == 5
    End(0, 0).write(run.ranks)
    assert not watchman.ask(signal.SIGINT), "nobody is left"


def test_this_process_is_not_stopped(tmp_path: Path) -> None:
    assert not is_stopped(os.getpid()) and not is_stopped(1, tmp_path)
    (tmp_path / "9").mkdir()
    (tmp_path / "9" / "stat").write_text("9 (a (b) c) T 1 2 3")
    assert is_stopped(9, tmp_path)
