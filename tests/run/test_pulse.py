"""A pulse tells where the work is while it moves and while it waits, and asks nothing of it; SIGUSR1 tells every stack."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tunedock.run import pulse as pulses
from tunedock.run.pulse import Beat, Pulse, read_beat
from tunedock.run.ranks import End, Rank, RankFiles, forget_beyond, put, ranks_in, read_end

WORK = """
import sys, time
from pathlib import Path
from tunedock.run.pulse import Pulse
from tunedock.run.ranks import Rank

def waits_for_the_others():
    time.sleep(60)

pulse = Pulse(Rank(1, 2, 1))
with pulse.beating(Path(sys.argv[1])):
    pulse.at(7, "all-reduce")
    waits_for_the_others()
"""


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulses, "EVERY_S", 0.02)
    monkeypatch.setattr(pulses, "STILL_S", 0.1)


def when(found: Callable[[], Any], within_s: float = 20.0) -> Any:
    deadline = time.monotonic() + within_s
    while not (value := found()):
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.01)
    return value


def test_a_pulse_is_written_while_the_work_moves_and_more_seldom_while_it_waits(tmp_path: Path) -> None:
    pulse, files = Pulse(Rank(3, 4, 1)), RankFiles(tmp_path / "ranks", 3)

    def beat() -> Beat:
        found = when(lambda: read_beat(files.pulse))
        assert isinstance(found, Beat)
        return found

    with pulse.beating(tmp_path / "ranks"):
        first = beat()
        assert (first.rank, first.step, first.what, first.pid) == (3, 0, "starting", os.getpid())
        assert first.patient, "what comes before the first step takes as long as it takes"
        pulse.at(5, "row")
        pulse.at(5, "all-reduce", waits=True)
        moved = when(lambda: found if (found := beat()).count == 2 else None)
        assert (moved.step, moved.what, moved.waits, moved.patient) == (5, "all-reduce", True, False)
        still = when(lambda: found if (found := beat()).written > moved.written else None)
        assert still.count == 2 and still.age_s > moved.age_s, "it waits, and is alive"
        pulse.at(6, "checkpoint")
    last = beat()
    assert (last.step, last.what) == (6, "checkpoint"), "the last word is kept"
    time.sleep(0.2)
    assert beat() == last, "and nothing is written after it"
    assert sorted(file.name for file in (tmp_path / "ranks").iterdir()) == ["rank-00003.json"], (
        "nobody asked for stacks"
    )


def test_a_pulse_that_is_still_writes_nothing_and_costs_next_to_nothing() -> None:
    pulse = Pulse()
    started = time.perf_counter()
    for step in range(10_000):
        pulse.at(step, "row")
    assert time.perf_counter() - started < 1.0
    assert (pulse.beat().step, pulse.beat().count) == (9_999, 10_000)


def test_waiting_for_others_is_a_part_of_what_is_done() -> None:
    pulse = Pulse()
    pulse.at(3, "row")
    with pulse.waiting(patient=True):
        inside = pulse.beat()
    after = pulse.beat()
    assert (inside.what, inside.waits, inside.patient) == ("row", True, True)
    assert (after.what, after.waits, after.patient, after.count) == ("row", False, False, 3)


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "ranks").write_text("a file where the folder should be")
    pulse = Pulse()
    with pulse.beating(tmp_path / "ranks"):
        pulse.at(1, "row")
        os.kill(os.getpid(), signal.SIGUSR1)
    assert read_beat(tmp_path / "ranks" / "rank-00000.json") is None


def test_a_disk_that_is_full_is_left_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "rank-00000.json", {"step": 1})

    def full(self: Path, *_: Any, **__: Any) -> None:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    put(tmp_path / "rank-00000.json", {"step": 2})
    assert [file.name for file in tmp_path.iterdir()] == ["rank-00000.json"]
    assert (tmp_path / "rank-00000.json").read_text() == '{"step": 1}\n'


@pytest.fixture
def waiting(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", WORK, str(tmp_path)])
    yield process
    process.kill()
    process.wait()


def test_stacks_are_told_where_a_process_hangs_and_it_goes_on(tmp_path: Path, waiting: subprocess.Popen[bytes]) -> None:
    files = RankFiles(tmp_path, 1)
    when(lambda: (beat := read_beat(files.pulse)) and beat.step == 7)
    waiting.send_signal(pulses.ASK)
    stack = when(lambda: "waits_for_the_others" in files.stack.read_text() and files.stack.read_text())
    assert "most recent call first" in stack and "_write_on" in stack, "every thread's"
    assert waiting.poll() is None


def test_a_process_that_is_stopped_writes_no_more(tmp_path: Path, waiting: subprocess.Popen[bytes]) -> None:
    file = RankFiles(tmp_path, 1).pulse
    when(lambda: read_beat(file))
    waiting.send_signal(signal.SIGSTOP)
    time.sleep(0.3)
    before = read_beat(file)
    time.sleep(1.5)
    assert read_beat(file) == before


def test_a_rank_is_one_of_many_only_where_torchrun_says_so() -> None:
    left = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3"}
    assert Rank.of(left) == Rank() and Rank().leads
    rank = Rank.of({**left, "TORCHELASTIC_RUN_ID": "x"})
    assert (rank.number, rank.world, rank.local, rank.leads) == (3, 8, 3, False)


def test_an_end_is_kept_and_read_and_an_earlier_starts_files_are_taken_away(tmp_path: Path) -> None:
    End(11, 9, {"kind": "DivergedError", "message": "the loss is nan"}).write(tmp_path / "ranks")
    (tmp_path / "ranks" / "rank-00002.json").write_text("{")
    files = ranks_in(tmp_path / "ranks")
    assert [each.number for each in files] == [2, 11]
    end = read_end(files[1].end)
    assert (
        end is not None and end.exit_code == 9 and end.error == {"kind": "DivergedError", "message": "the loss is nan"}
    )
    assert read_end(files[0].end) is None and read_beat(files[0].pulse) is None, "half a file says nothing"
    for each in files:
        each.clear()
    assert not list((tmp_path / "ranks").iterdir())


def test_what_more_ranks_left_at_an_earlier_start_is_forgotten(tmp_path: Path) -> None:
    for number in range(4):
        put(RankFiles(tmp_path, number).pulse, {"rank": number})
    End(3, 0).write(tmp_path)
    forget_beyond(tmp_path, 2)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["rank-00000.json", "rank-00001.json"]
