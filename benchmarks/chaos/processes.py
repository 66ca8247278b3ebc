"""Faults of processes: killed, stopped, started twice, and a command whose terminal or reader goes away."""

from __future__ import annotations

import fcntl
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress

from benchmarks.chaos.injection import Outcome, Trial, Unexpected, at_work, expect, still_at_work
from benchmarks.chaos.life import AIM_S, Steps, begin, fingerprint, lost_steps
from benchmarks.chaos.project import Shape
from tunedock.run.record import Run

SMALLEST_PIPE_BYTES = 4096


def killed(trial: Trial) -> Outcome:
    """SIGKILL: every third while a checkpoint is being written, every eighth before the first step, the others anywhere."""
    shape = Shape(steps=3 * trial.times + 12, batch=2)
    wanted = trial.undisturbed(shape)
    run = trial.disturbed(shape)
    kills = writing = 0
    while kills < trial.times:
        life = begin(run, resume=kills > 0)
        if kills % 3 == 1:
            if not life.until(lambda: any(run.checkpoints.glob(".step-*.part")), every_s=AIM_S):
                break
            time.sleep(trial.draw.uniform(0, 0.01))
            writing += any(run.checkpoints.glob(".step-*.part"))
        elif kills % 8 == 7:
            time.sleep(trial.draw.uniform(0, 0.8))
        elif at_work(life, trial.draw.randint(1, 4)):
            time.sleep(trial.draw.uniform(0, 0.1))
        if life.ended():
            break
        life.kill()
        kills += 1
    expect(begin(run, resume=True), 0)
    note = f"{writing} of them while a checkpoint was being written"
    return Outcome(trial.fault, kills, lost_steps(run), fingerprint(run) == wanted, note)


def stopped(trial: Trial, number: signal.Signals, code: int) -> Outcome:
    """Asked to stop in the middle of a step."""
    shape = Shape(steps=6 * trial.times + 12, save=1000)
    wanted = trial.undisturbed(shape)
    run = trial.disturbed(shape)
    longest = 0.0
    for turn in range(trial.times):
        life = begin(run, resume=turn > 0)
        still_at_work(life, trial.draw.randint(1, 4))
        time.sleep(trial.draw.uniform(0, 0.05))
        life.send(number)
        asked = time.monotonic()
        expect(life, code)
        longest = max(longest, time.monotonic() - asked)
    return trial.finished(run, wanted, f"exit code {code}; {longest:.1f} s from the signal to the end at most")


def two_at_once(trial: Trial) -> Outcome:
    """The same run is started twice at the same moment."""
    shape = Shape(steps=6 * trial.times + 12)
    wanted = trial.undisturbed(shape)
    run = trial.disturbed(shape)
    for turn in range(trial.times):
        pair = [begin(run, resume=turn > 0), begin(run, resume=turn > 0)]
        while not any(life.ended() for life in pair):
            time.sleep(0.005)
        refused = next(life for life in pair if life.ended())
        expect(refused, 5)
        other = next(life for life in pair if life is not refused)
        still_at_work(other)
        other.kill()
    return trial.finished(run, wanted, "one is refused (exit code 5), the other goes on")


# -- the command, whose launcher is disturbed and whose worker goes on -------------------------------------------------


def hang_up(trial: Trial) -> Outcome:
    """The terminal closes: SIGHUP to the command."""
    return _followed(trial, lambda process: process.send_signal(signal.SIGHUP), "the command ends, its worker goes on")


def closed_pipe(trial: Trial) -> Outcome:
    """What reads the command's output is gone: `| head`."""

    def close(process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None  # noqa: S101 - opened as a pipe
        process.stdout.close()

    return _followed(trial, close, "the worker writes to files")


def stalled_reader(trial: Trial) -> Outcome:
    """What reads the command's output reads no more, and the pipe is as small as pipes get."""

    def stall(process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None  # noqa: S101 - opened as a pipe
        with suppress(OSError, AttributeError):
            fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, SMALLEST_PIPE_BYTES)

    return _followed(trial, stall, "the worker writes to files, and waits for no reader")


def _followed(trial: Trial, disturb: Callable[[subprocess.Popen[bytes]], None], note: str) -> Outcome:
    """A run for each time: a command that has lost its terminal has no second one to lose."""
    shape = Shape(steps=96, save=96)
    wanted = trial.undisturbed(shape)
    lost, same = 0, []
    for turn in range(trial.times):
        run = trial.disturbed(shape, f"followed-{turn}")
        _through_the_command(run, disturb)
        lost += lost_steps(run)
        same.append(fingerprint(run) == wanted)
    return Outcome(trial.fault, trial.times, lost, all(same), note)


def _through_the_command(run: Run, disturb: Callable[[subprocess.Popen[bytes]], None]) -> None:
    """The real command on a run made by `project.write`; disturbed after two steps, and waited for until the run is finished."""
    command = [sys.executable, "-m", "tunedock", "train", "--resume", str(run.path)]
    process = subprocess.Popen(
        command,
        cwd=run.path.parent,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        count = Steps(run)
        _until(lambda: count() >= 2)
        disturb(process)
        _until(lambda: run.state().status not in ("created", "running"))
        state = run.state()
        if state.status != "finished":
            raise Unexpected(f"the run is {state.status}: {state.error}")
    finally:
        process.kill()
        if process.stdout is not None:
            process.stdout.close()
        process.wait()


def _until(so: Callable[[], bool], timeout_s: float = 1800.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not so():
        if time.monotonic() > deadline:
            raise TimeoutError(f"this took longer than {timeout_s:g} s")
        time.sleep(0.02)
