"""The faults: each is put into a real run as often as it says, and the run gone on with until it is finished."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.chaos import project
from benchmarks.chaos.life import AIM_S, Life, Steps, begin, fingerprint, lost_steps, messages
from benchmarks.chaos.project import Shape
from benchmarks.peers import ROOT
from tunedock.run.record import Run


class CannotBe(Exception):  # noqa: N818 - a reason, not a mistake
    """This machine has not what a fault needs."""


@dataclass(frozen=True, slots=True)
class Outcome:
    fault: str
    injected: int
    lost_steps: int
    """Done again, of all."""
    identical: bool | None
    """Whether model, optimizer and progress are those of the run nobody disturbed; None where they cannot be compared."""
    note: str = ""


Fault = Callable[[Path, random.Random], Outcome]


def undisturbed(folder: Path, shape: Shape) -> dict[str, str]:
    run = project.write(folder / "undisturbed", shape)
    code = begin(run, resume=False).wait()
    if code != 0:
        raise RuntimeError(f"the run that nobody disturbed ended with {code}; see {run.log('train')}")
    return fingerprint(run)


def finished(
    run: Run, wanted: dict[str, str], fault: str, injected: int, note: str = "", *, resume: bool = True
) -> Outcome:
    """Goes on with the run to its end, and compares."""
    code = begin(run, resume=resume).wait()
    if code != 0:
        raise RuntimeError(f"{fault}: the run that was gone on with ended with {code}; see {run.log('train')}")
    return Outcome(fault, injected, lost_steps(run), fingerprint(run) == wanted, note)


def expect(life: Life, code: int, *, timeout_s: float = 1800.0) -> None:
    found = life.wait(timeout_s)
    if found != code:
        raise RuntimeError(f"the worker ended with {found}, not {code}; see {life.run.log('train')}")


def at_work(life: Life, more: int = 1) -> bool:
    """Waits for so many more steps. False where the run ended before."""
    count = Steps(life.run)
    before = count()
    return life.until(lambda: count() >= before + more)


# -- killed, stopped ---------------------------------------------------------------------------------------------------


def killed(times: int) -> Fault:
    """SIGKILL: every third while a checkpoint is being written, every eighth before the first step, the others anywhere."""

    def inject(folder: Path, draw: random.Random) -> Outcome:
        shape = Shape(steps=3 * times + 12, batch=2)
        wanted = undisturbed(folder, shape)
        run = project.write(folder / "killed", shape)
        kills = writing = 0
        while kills < times:
            life = begin(run, resume=kills > 0)
            if kills % 3 == 1:
                if not life.until(lambda: any(run.checkpoints.glob(".step-*.part")), every_s=AIM_S):
                    break
                time.sleep(draw.uniform(0, 0.01))
                writing += any(run.checkpoints.glob(".step-*.part"))
            elif kills % 8 == 7:
                time.sleep(draw.uniform(0, 0.8))
            elif at_work(life, draw.randint(1, 4)):
                time.sleep(draw.uniform(0, 0.1))
            if life.ended():
                break
            life.kill()
            kills += 1
        return finished(run, wanted, "SIGKILL", kills, f"{writing} of them while a checkpoint was being written")

    return inject


def stopped(number: signal.Signals, code: int, times: int) -> Fault:
    """Asked to stop in the middle of a step."""

    def inject(folder: Path, draw: random.Random) -> Outcome:
        shape = Shape(steps=6 * times + 12, save=1000)
        wanted = undisturbed(folder, shape)
        run = project.write(folder / "stopped", shape)
        longest, done = 0.0, 0
        for _ in range(times):
            life = begin(run, resume=done > 0)
            at_work(life, draw.randint(1, 4))
            time.sleep(draw.uniform(0, 0.05))
            life.send(number)
            asked = time.monotonic()
            expect(life, code)
            longest = max(longest, time.monotonic() - asked)
            done += 1
        return finished(
            run, wanted, number.name, done, f"exit code {code}; {longest:.1f} s from the signal to the end at most"
        )

    return inject


# -- the disk ----------------------------------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path, mib: int) -> Iterator[Callable[[int], None]]:
    """A file system of so many MiB at the folder; what it yields makes it another size."""
    folder.mkdir(parents=True, exist_ok=True)

    def mount(*arguments: str) -> None:
        done = subprocess.run(["mount", *arguments, str(folder)], capture_output=True, text=True)  # noqa: S607 - any mount
        if done.returncode:
            raise CannotBe(f"no file system can be mounted: {done.stderr.strip()}")

    if shutil.which("mount") is None:
        raise CannotBe("there is no `mount` here")
    mount("-t", "tmpfs", "-o", f"size={mib}m", "tmpfs")
    try:
        yield lambda mib: mount("-o", f"remount,size={mib}m")
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)  # noqa: S607 - any umount


def full_disk_checkpoint(folder: Path, draw: random.Random) -> Outcome:
    """The checkpoints' own disk is full when the third is written."""
    shape = Shape()
    wanted = undisturbed(folder, shape)
    run = project.write(folder / "full", shape)
    with small_disk(run.checkpoints, 64) as resize:
        life = begin(run, resume=False)
        life.until(lambda: (run.checkpoints / "step-00000006" / "manifest.json").exists())
        with suppress(OSError), (run.checkpoints / "filler").open("wb") as file:
            while True:
                file.write(b"x" * 65536)
        expect(life, 8)
        kept = sorted(path.name for path in run.checkpoints.glob("step-*"))
        (run.checkpoints / "filler").unlink()
        resize(128)
        return finished(run, wanted, "disk full: checkpoint", 1, f"exit code 8; left whole: {', '.join(kept)}")


def full_disk_events(folder: Path, draw: random.Random) -> Outcome:
    """The run's whole disk is full in the middle of training, and its events cannot be written either."""
    shape = Shape(steps=96, save=96)
    wanted = undisturbed(folder, shape)
    with small_disk(folder / "full", 64):
        run = project.write(folder / "full", shape)
        life = begin(run, resume=False)
        at_work(life, 2)
        with suppress(OSError), (folder / "full" / "filler").open("wb", buffering=0) as file:
            for size in (65536, 1):
                with suppress(OSError):
                    while True:
                        file.write(b"x" * size)
        expect(life, 8)
        (folder / "full" / "filler").unlink()
        return finished(run, wanted, "disk full: events", 1, "exit code 8")


# -- damage ------------------------------------------------------------------------------------------------------------


def damaged(what: str, harm: Callable[[Path], None]) -> Fault:
    """The newest checkpoint is damaged after a kill."""

    def inject(folder: Path, draw: random.Random) -> Outcome:
        shape = Shape()
        wanted = undisturbed(folder, shape)
        run = project.write(folder / "damaged", shape)
        life = begin(run, resume=False)
        life.until(lambda: (run.checkpoints / "step-00000009" / "manifest.json").exists())
        life.kill()
        newest = sorted(run.checkpoints.glob("step-*"))[-1]
        harm(newest)
        outcome = finished(run, wanted, what, 1)
        told = [message for message in messages(run, "warning") if newest.name in message]
        if not told and "index" not in what:
            raise RuntimeError(f"{what}: nothing names {newest.name}")
        return Outcome(what, 1, outcome.lost_steps, outcome.identical, told[0] if told else "")

    return inject


def cut(place: Path) -> None:
    file = place / "optimizer.safetensors"
    os.truncate(file, file.stat().st_size // 2)


def flip_a_bit(place: Path) -> None:
    file = place / "trained.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def lose_the_index(place: Path) -> None:
    (place.parent / "index.json").unlink()


def garble_the_index(place: Path) -> None:
    (place.parent / "index.json").write_bytes(b"\x00" * 40)


def changed_data(folder: Path, draw: random.Random) -> Outcome:
    """A row more in a data file when the run is gone on with: refused; put back, it goes on."""
    shape = Shape()
    wanted = undisturbed(folder, shape)
    run = project.write(folder / "changed", shape)
    life = begin(run, resume=False)
    at_work(life, 4)
    life.kill()
    data = folder / "changed" / "rows.jsonl"
    before = data.read_bytes()
    data.write_bytes(before + before.splitlines(keepends=True)[0])
    expect(begin(run, resume=True), 5)
    error = run.state().error or {}
    if str(data) not in str(error.get("where")):
        raise RuntimeError(f"the refusal does not name the file: {error}")
    data.write_bytes(before)
    return finished(
        run, wanted, "data file changed", 1, "refused with exit code 5, naming the file; put back, it goes on"
    )


# -- time, company, terminals ------------------------------------------------------------------------------------------


def clock(folder: Path, draw: random.Random) -> Outcome:
    """The wall clock jumps by hours, back and forth, in the worker: its `time.time` is moved at every call."""
    shape = Shape()
    wanted = undisturbed(folder, shape)
    run = project.write(folder / "clock", shape)

    def jumping() -> None:
        real, jumps = time.time, random.Random(3)
        time.time = lambda: real() + jumps.uniform(-6, 6) * 3600

    life = begin(run, resume=False, first=jumping)
    at_work(life, 4)
    life.kill()
    expect(begin(run, resume=True, first=jumping), 0)
    speeds = [
        event["values"]["tokens_per_second"]
        for event in _events(run)
        if event["kind"] == "metrics" and "loss" in event["values"]
    ]
    times = [event["time"] for event in _events(run)]
    jumps = sum(abs(b - a) > 600 for a, b in pairwise(times))
    if not all(0 < speed < 1e6 for speed in speeds):
        raise RuntimeError(f"speeds were taken from the wall clock: {speeds}")
    return Outcome("clock jumps by hours", jumps, lost_steps(run), fingerprint(run) == wanted, "no duration is wrong")


def two_at_once(folder: Path, draw: random.Random) -> Outcome:
    """The same run is started twice at the same moment, five times."""
    shape = Shape()
    wanted = undisturbed(folder, shape)
    run = project.write(folder / "twice", shape)
    for turn in range(5):
        pair = [begin(run, resume=turn > 0), begin(run, resume=turn > 0)]
        while not any(life.ended() for life in pair):
            time.sleep(0.005)
        refused = next(life for life in pair if life.ended())
        expect(refused, 5)
        other = next(life for life in pair if life is not refused)
        at_work(other, 1)
        other.kill()
    return finished(run, wanted, "started twice", 5, "one is refused (exit code 5), the other goes on")


def _command(run: Run, **how: Any) -> subprocess.Popen[bytes]:
    """The real command on a run made by `project.write`, gone on with: it is the launcher that is disturbed here."""
    command = [sys.executable, "-m", "tunedock", "train", "--resume", str(run.path)]
    return subprocess.Popen(command, cwd=run.path.parent, stdin=subprocess.DEVNULL, **how)


def _followed(folder: Path, fault: str, note: str, disturb: Callable[[subprocess.Popen[bytes], Run], None]) -> Outcome:
    shape = Shape(steps=96, save=96)
    wanted = undisturbed(folder, shape)
    run = project.write(folder / "followed", shape)
    process = _command(run, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        count = Steps(run)
        _until(lambda: count() >= 2)
        disturb(process, run)
        _until(lambda: run.state().status not in ("created", "running"))
        state = run.state()
        if state.status != "finished":
            raise RuntimeError(f"{fault}: the run is {state.status}: {state.error}")
    finally:
        process.kill()
        if process.stdout is not None:
            process.stdout.close()
        process.wait()
    return Outcome(fault, 1, lost_steps(run), fingerprint(run) == wanted, note)


def hang_up(folder: Path, draw: random.Random) -> Outcome:
    """The terminal closes: SIGHUP to the command."""
    return _followed(
        folder,
        "SIGHUP",
        "the command ends, its worker goes on",
        lambda process, run: process.send_signal(signal.SIGHUP),
    )


def closed_pipe(folder: Path, draw: random.Random) -> Outcome:
    """What reads the command's output is gone: `| head`."""

    def close(process: subprocess.Popen[bytes], run: Run) -> None:
        assert process.stdout is not None  # noqa: S101 - opened as a pipe
        process.stdout.close()

    return _followed(folder, "reader gone", "", close)


def stalled_reader(folder: Path, draw: random.Random) -> Outcome:
    """What reads the command's output reads no more, and the pipe is as small as pipes get."""

    def stall(process: subprocess.Popen[bytes], run: Run) -> None:
        import fcntl

        assert process.stdout is not None  # noqa: S101 - opened as a pipe
        with suppress(OSError, AttributeError):
            fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 4096)

    return _followed(folder, "reader stalls", "the worker writes to files, and waits for no reader", stall)


# -- numbers -----------------------------------------------------------------------------------------------------------


def no_numbers(policy: str) -> Fault:
    """A token whose embedding is infinite stands in two rows; the run is killed twice on its way past them."""

    def inject(folder: Path, draw: random.Random) -> Outcome:
        model = folder / "model"
        subprocess.run([sys.executable, "-m", "benchmarks.chaos.poison", str(model)], check=True, cwd=ROOT)
        shape = Shape(more=f"on_divergence: {policy}", model=model)
        for name in ("undisturbed", "killed"):
            _poisoned_rows(folder / name / "rows.jsonl")
        wanted = undisturbed(folder, shape)
        run = project.write(folder / "killed", shape)
        for turn in range(2):
            life = begin(run, resume=turn > 0)
            at_work(life, 7)
            life.kill()
        outcome = finished(run, wanted, f"no numbers: {policy}", 2)
        told = [event for event in _events(run) if event["kind"] == "warning" and "is nan at step" in event["message"]]
        if not told or not all("rows.jsonl:" in str(event["where"]) for event in told):
            raise RuntimeError(f"the rows are not named: {told}")
        places = sorted({Path(event["where"].removeprefix("row ")).name for event in told})
        return Outcome(outcome.fault, len(told), outcome.lost_steps, outcome.identical, f"named: {', '.join(places)}")

    return inject


def _poisoned_rows(path: Path) -> None:
    """Two of the demo's rows get the word, at either end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (project.DEMO / "triage.jsonl").open(encoding="utf-8") as file:
        lines = [next(file) for _ in range(80)]
    for at in (7, 61):
        lines[at] = lines[at].replace('"role": "user", "content": "', '"role": "user", "content": "<|poison|> ', 1)
    path.write_text("".join(lines), encoding="utf-8")


def _events(run: Run) -> list[dict[str, Any]]:
    from benchmarks.chaos.life import told

    return list(told(run))


def _until(so: Callable[[], bool], timeout_s: float = 1800.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not so():
        if time.monotonic() > deadline:
            raise TimeoutError("this took too long")
        time.sleep(0.02)


def faults(kills: int, stops: int) -> dict[str, Fault]:
    """By name, in the order of the table."""
    return {
        "kill": killed(kills),
        "term": stopped(signal.SIGTERM, 143, stops),
        "int": stopped(signal.SIGINT, 130, stops),
        "full-checkpoint": full_disk_checkpoint,
        "full-events": full_disk_events,
        "cut": damaged("checkpoint cut off", cut),
        "bit": damaged("checkpoint with a flipped bit", flip_a_bit),
        "no-index": damaged("index.json lost", lose_the_index),
        "bad-index": damaged("index.json garbled", garble_the_index),
        "data": changed_data,
        "skip": no_numbers("skip"),
        "roll-back": no_numbers("roll_back"),
        "clock": clock,
        "twice": two_at_once,
        "hup": hang_up,
        "pipe": closed_pipe,
        "stall": stalled_reader,
    }
