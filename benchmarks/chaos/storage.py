"""Faults of storage: a disk that is full, a checkpoint that is cut off or has a flipped bit, an index that is lost or garbled."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from benchmarks.chaos import project
from benchmarks.chaos.injection import CannotBe, Outcome, Trial, Unexpected, expect, newest, still_at_work, until_saved
from benchmarks.chaos.life import Life, begin, messages
from benchmarks.chaos.project import Shape
from tunedock.run.record import Run

DISK_MIB = 64

# -- full --------------------------------------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system of `DISK_MIB` at the folder. Raises CannotBe where none can be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.which("mount") is None:
        raise CannotBe("no `mount`")
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CannotBe(f"no file system can be mounted: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)  # noqa: S607 - any umount


def keep_full(filler: Path, life: Life) -> None:
    """Fills the disk to its last byte, and what the worker frees too, until it has ended for that. Then there is space again."""
    with filler.open("wb", buffering=0) as file:
        while True:
            for size in (65536, 1):
                with suppress(OSError):
                    while True:
                        file.write(b"x" * size)
            if not life.until(lambda: os.statvfs(filler.parent).f_bfree > 0):
                break
    filler.unlink()
    expect(life, 8)


def full_disk_checkpoint(trial: Trial) -> Outcome:
    """The checkpoints' own disk is full when the next is written."""
    shape = Shape(steps=6 * trial.times + 12)
    wanted = trial.undisturbed(shape)
    run = trial.disturbed(shape)
    with small_disk(run.checkpoints):
        for turn in range(trial.times):
            life = begin(run, resume=turn > 0)
            until_saved(life, newest(run) + shape.save)
            keep_full(run.checkpoints / "filler", life)
        outcome = trial.finished(run, wanted, "exit code 8; the checkpoints that are there stay whole")
    if damaged := [message for message in messages(run, "warning") if "damaged" in message]:
        raise Unexpected(f"a checkpoint did not stay whole: {damaged}")
    return outcome


def full_disk_events(trial: Trial) -> Outcome:
    """The run's whole disk is full in the middle of training, and its events cannot be written either."""
    shape = Shape(steps=96, save=96)
    wanted = trial.undisturbed(shape)
    place = trial.folder / "full"
    with small_disk(place):
        run = project.write(place, shape)
        for turn in range(trial.times):
            life = begin(run, resume=turn > 0)
            still_at_work(life, 2)
            keep_full(place / "filler", life)
        return trial.finished(run, wanted, "exit code 8, though no event can say so")


# -- damaged -----------------------------------------------------------------------------------------------------------

Harm = Callable[[Path, random.Random], str]
"""Does it to a checkpoint, or to the index beside it, and says to which file."""


def damaged_checkpoint(trial: Trial, harm: Harm) -> Outcome:
    """The newest checkpoint is damaged after a kill: the one before is taken, and a warning names checkpoint and file."""
    run, outcome, harmed = _damaged(trial, harm)
    told = messages(run, "warning")
    for checkpoint, file in harmed:
        if not any(checkpoint in message and file in message for message in told):
            raise Unexpected(f"no warning names {file} of {checkpoint}: {told}")
    return replace(outcome, note=f"passed over and named: {', '.join(file for _, file in harmed)}")


def damaged_index(trial: Trial, harm: Harm) -> Outcome:
    """The index is damaged after a kill: made again, and no checkpoint is passed over."""
    run, outcome, _ = _damaged(trial, harm)
    if passed := [message for message in messages(run, "warning") if "passed over" in message]:
        raise Unexpected(f"a whole checkpoint was passed over: {passed}")
    return replace(outcome, note="made again from the checkpoints")


def _damaged(trial: Trial, harm: Harm) -> tuple[Run, Outcome, list[tuple[str, str]]]:
    shape = Shape(steps=9 * trial.times + 12)
    wanted = trial.undisturbed(shape)
    run = trial.disturbed(shape)
    harmed = []
    for turn in range(trial.times):
        life = begin(run, resume=turn > 0)
        until_saved(life, newest(run) + 2 * shape.save)
        life.kill()
        place = run.checkpoints / f"step-{newest(run):08d}"
        harmed.append((place.name, harm(place, trial.draw)))
    return run, trial.finished(run, wanted), harmed


def cut(place: Path, draw: random.Random) -> str:
    file = draw.choice(_contents(place))
    os.truncate(file, draw.randrange(file.stat().st_size))
    return file.name


def flip_a_bit(place: Path, draw: random.Random) -> str:
    file = draw.choice(_contents(place))
    content = bytearray(file.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)
    return file.name


def _contents(place: Path) -> list[Path]:
    return sorted(path for path in place.iterdir() if path.name != "manifest.json" and path.stat().st_size)


def lose_the_index(place: Path, draw: random.Random) -> str:
    (place.parent / "index.json").unlink()
    return "index.json"


def garble_the_index(place: Path, draw: random.Random) -> str:
    (place.parent / "index.json").write_bytes(draw.randbytes(40))
    return "index.json"
