"""One of many ranks: its request comes from a file, and what is the run's is left to rank 0. Real workers, told they are ranks;
only what they train is put in the place of training."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tunedock.events import EventReader
from tunedock.run.pulse import read_beat
from tunedock.run.ranks import RankFiles, read_end
from tunedock.run.record import Run

WORKER = """
import sys
from tunedock import worker
from tunedock.errors import DataError

def fails(call):
    print("a library's word")
    call.emit.note("what every rank would tell")
    raise DataError(f"rank {call.rank.number} of {call.rank.world} was asked for {call.request['asked']}")

worker.STAGES["train"] = fails
sys.exit(worker.main(sys.argv[1:]))
"""


INTERRUPTED = """
import os, signal
from tunedock import worker

understood = worker.understood

def late(raised):
    os.kill(os.getpid(), signal.SIGTERM)
    return understood(raised)

worker.understood = late
"""


def start(run: Run, request: Path, number: int, *, worker: str = WORKER) -> subprocess.Popen[bytes]:
    told = {"TORCHELASTIC_RUN_ID": "x", "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2"}
    return subprocess.Popen(
        [sys.executable, "-c", worker, "train", str(run.path), "--request", str(request)],
        env={**os.environ, **told},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def test_rank_0_writes_what_the_run_is_and_each_rank_its_own_end(run: Run, tmp_path: Path) -> None:
    (tmp_path / "request.json").write_text('{"asked": "this"}')
    workers = [start(run, tmp_path / "request.json", number) for number in range(2)]
    assert [worker.wait(60) for worker in workers] == [3, 3]
    files = [RankFiles(run.ranks, number) for number in range(2)]
    for number, each in enumerate(files):
        end, beat = read_end(each.end), read_beat(each.pulse)
        assert end is not None and beat is not None
        assert (end.rank, end.exit_code, beat.rank) == (number, 3, number)
        assert end.error is not None and end.error["message"] == f"rank {number} of 2 was asked for this"
    assert run.state().status == "failed"
    assert [event["kind"] for event in EventReader(run.events).new()] == ["stage", "note", "failure"], "rank 0's"
    assert not files[0].events.exists()
    assert [event["kind"] for event in EventReader(files[1].events).new()] == ["failure"]
    assert run.log("train", 1).read_text() == "a library's word\n", "a rank prints into a log of its own"
    assert run.log("train", 1).name == "train.rank-00001.log"


def test_a_sigterm_does_not_cut_last_words_short(run: Run, tmp_path: Path) -> None:
    """torchrun sends one to every rank once the first of them has failed."""
    (tmp_path / "request.json").write_text('{"asked": "this"}')
    assert start(run, tmp_path / "request.json", 0, worker=INTERRUPTED + WORKER).wait(60) == 3
    end = read_end(RankFiles(run.ranks, 0).end)
    assert end is not None and end.exit_code == 3
    assert run.state().status == "failed" and run.state().exit_code == 3


def test_a_request_that_is_no_file_or_comes_otherwise_is_a_wrong_call(run: Run) -> None:
    for more in (["--requests", "x"], ["--request"], ["more"]):
        made = subprocess.run(
            [sys.executable, "-m", "tunedock.worker", "train", str(run.path), *more], capture_output=True, text=True
        )
        assert made.returncode == 2 and "[--request FILE]" in made.stderr
