"""The wall clock is set while the run goes, by hours, forward and back: libfaketime gives the worker another clock.

The worker is a program of its own here, with the library loaded before all others. What time it is for it stands in a file, which
the library reads at each look at the clock: a new offset there is what NTP or an operator does. The monotonic clock is left alone,
as the kernel leaves it alone, and so are the times of files.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from benchmarks.chaos.injection import CannotBe, Outcome, Trial, Unexpected, expect, still_at_work
from benchmarks.chaos.life import begin, program, told
from benchmarks.chaos.project import Shape

HOURS = (3, -5)
"""Where the clock jumps to, in turn, from the true time: each jump is one of eight hours, but for the first."""

PLACES = ("usr/lib/*/faketime", "usr/lib*/faketime", "usr/local/lib/faketime")


HOW = {"FAKETIME_NO_CACHE": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1", "NO_FAKE_STAT": "1"}

WORKER = """
import runpy, select, time
time.sleep = lambda seconds: select.select([], [], [], seconds) and None
runpy.run_module("tunedock.worker", run_name="__main__", alter_sys=True)
"""
"""The library's `clock_nanosleep` fails (EINVAL) where a short sleep is over before it has begun, on a busy machine."""


def library() -> Path:
    """The one for programs with threads. Raises CannotBe where libfaketime is not installed."""
    found = next((path for place in PLACES for path in Path("/").glob(f"{place}/libfaketimeMT.so.1")), None)
    if found is None:
        raise CannotBe("no libfaketime (Debian: `faketime`)")
    return found


def set_clock(file: Path, hours: int) -> None:
    """At once: a reader sees the old offset or the new one, never half of it."""
    aside = file.with_suffix(".new")
    aside.write_text(f"{hours:+d}h\n")
    aside.replace(file)


def _clean_up(pid: int) -> None:
    """What the library leaves of a process in shared memory."""
    for name in (f"faketime_shm_{pid}", f"sem.faketime_sem_{pid}"):
        Path("/dev/shm", name).unlink(missing_ok=True)  # noqa: S108 - the library's own choice


def clock(trial: Trial) -> Outcome:
    """Jumps at `times` moments, and a kill after the first, so that what comes next is resumed at another time of day."""
    preload = library()
    shape = Shape(steps=6 * trial.times + 12)
    wanted = trial.undisturbed(shape)
    run = trial.disturbed(shape)
    file = trial.folder / "offset"
    set_clock(file, 0)
    environment = {"LD_PRELOAD": str(preload), "FAKETIME_TIMESTAMP_FILE": str(file), **HOW}
    start = program(run, environment, ("-P", "-c", WORKER))
    life = begin(run, resume=False, first=start)
    for turn in range(trial.times):
        still_at_work(life, trial.draw.randint(2, 4))
        set_clock(file, HOURS[turn % len(HOURS)])
        if turn == 0:
            still_at_work(life, 2)
            life.kill()
            _clean_up(life.pid)
            life = begin(run, resume=True, first=start)
    expect(life, 0)
    _clean_up(life.pid)
    events = list(told(run))
    jumps = sum(abs(later["time"] - earlier["time"]) > 3600 for earlier, later in pairwise(events))
    if jumps != trial.times:
        raise Unexpected(f"the worker saw {jumps} jumps of its clock, not {trial.times}")
    speeds = [event["values"]["tokens_per_second"] for event in events if "loss" in event.get("values", {})]
    if not all(0 < speed < 1e6 for speed in speeds):
        raise Unexpected(f"speeds were taken from the wall clock: {speeds}")
    return trial.outcome(run, wanted, "forward and back, a resume in between; no duration is wrong")
