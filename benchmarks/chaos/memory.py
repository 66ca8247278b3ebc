"""Faults of memory: the kernel kills the worker within its control group, or an allocation fails in the middle of a step.

The kernel's kill is a real one, of a group with a limit, in which another process takes all that is left. A failing allocation is
a real one too: the worker's address space is limited from outside while it is at work (RLIMIT_AS), and given back.

A run that goes on in smaller rows adds up the same sums in another order. So it is held against a run that nobody disturbs and that
makes its rows, step by step, of the sizes the disturbed one recorded: the same to the bit. How far both are from the run in large
rows is told beside it.
"""

from __future__ import annotations

import json
import math
import resource
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks.chaos.injection import CannotBe, Outcome, Trial, Unexpected, expect, still_at_work
from benchmarks.chaos.life import AIM_S, Life, Steps, begin, messages, program
from benchmarks.chaos.memory_group import enter, memory_group, python_in, take_memory_until_killed
from benchmarks.chaos.project import Shape
from tunedock.launch.supervise import RESUMES
from tunedock.run.record import Run

GROUP_BYTES = 1536 << 20
"""A worker of its own needs a third of it."""

MOST_APART = 1e-5
"""Of the weights' own length, between rows of different sizes: float32 sums in another order came to a hundredth of it."""

FROM_THE_KERNEL = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
"""Every tensor gets memory of its own from the kernel and gives it back: what a step takes can be seen, and refused."""

LEFT = 0.65
"""The share of what a step takes at its peak that is left to it."""


def killed_by_the_kernel(trial: Trial) -> Outcome:
    """Another process takes the memory for a moment, and the run is gone on with when it is back."""
    shape = Shape(steps=6 * trial.times + 12)
    wanted = trial.undisturbed(shape)
    run = trial.disturbed(shape)
    with memory_group(GROUP_BYTES) as group:
        for turn in range(trial.times):
            life = begin(run, resume=turn > 0, first=partial(enter, group))
            still_at_work(life, trial.draw.randint(2, 4))
            # Stopped meanwhile: it looks at free memory before each row, and would make its rows smaller before it is killed.
            life.send(signal.SIGSTOP)
            take_memory_until_killed(group, life.pid)
            expect(life, -signal.SIGKILL, timeout_s=60)
        if (kills := group.oom_kills) is not None and kills < trial.times:
            raise Unexpected(f"the kernel counts {kills} kills, not {trial.times}")
    return trial.finished(run, wanted, "in a control group; gone on with when memory was back")


def supervised(trial: Trial) -> Outcome:
    """The command and its worker are in the group: after each kill the command goes on by itself, with half the token budget."""
    trial = replace(trial, times=min(trial.times, RESUMES))
    shape = Shape(steps=12 * trial.times + 24, batch=16, dropout=0.0, more="bf16: false")
    large = trial.undisturbed_run(shape)
    run = trial.disturbed(shape)
    with memory_group(GROUP_BYTES) as group:
        process = subprocess.Popen(
            python_in(group, ["-m", "tunedock", "train", "--resume", str(run.path)]),
            cwd=run.path.parent,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            count = Steps(run)
            for _ in range(trial.times):
                goal = count() + trial.draw.randint(shape.save + 1, 2 * shape.save)
                while count() < goal and process.poll() is None:
                    time.sleep(0.01)
                take_memory_until_killed(group, run.state().pid or 0)
            code = process.wait(timeout=900)
        finally:
            process.kill()
            process.wait()
    lowered = [message for message in messages(run, "warning") if "the kernel killed the worker" in message]
    if code != 0 or len(lowered) != trial.times:
        raise Unexpected(f"`tunedock train` ended with {code}; it told of {len(lowered)} kills: {lowered}")
    apart = _apart(run, large)
    if not apart < MOST_APART:
        raise Unexpected(f"weights are {apart:.1e} of their length from those of the run in larger rows")
    note = f"{_rows(run)}; weights {apart:.0e} of their length from those of the run in {shape.budget}"
    return trial.outcome(run, trial.replayed(shape, run), note)


def failed_allocation(trial: Trial) -> Outcome:
    """Rows of a step need more than they are given: the step is thrown away, and done again in smaller rows."""
    if not hasattr(resource, "prlimit"):
        raise CannotBe("no prlimit")
    # Nothing is saved on the way: CPython waits for ever for a thread that had no memory to begin, and a save begins one.
    shape = Shape(steps=14 * trial.times + 12, save=1000, batch=16, budget=2048)
    run = trial.disturbed(shape)
    life = begin(run, resume=False, first=program(run, FROM_THE_KERNEL))
    for _ in range(trial.times):
        still_at_work(life, trial.draw.randint(2, 4))
        _refuse_a_row(life)
    expect(life, 0)
    return trial.outcome(run, trial.replayed(shape, run), f"caught in the step; {_rows(run)}")


def _caught(run: Run) -> list[str]:
    return [message for message in messages(run, "note") if "do not fit" in message]


def _rows(run: Run) -> str:
    """The sizes of its rows, in order."""
    sizes = [change["tokens"] for change in json.loads((run.path / "budget.json").read_text())]
    return f"rows of {', '.join(map(str, sizes))} tokens"


def _extent(life: Life) -> tuple[int, int]:
    """The least and the most of address space, in bytes, that the worker has in four steps."""
    sizes: list[int] = []
    count = Steps(life.run)
    goal = count() + 4

    def done() -> bool:
        with suppress(OSError):
            sizes.append(int(Path(f"/proc/{life.pid}/statm").read_text().split()[0]) * resource.getpagesize())
        return count() >= goal

    if not life.until(done, every_s=AIM_S):
        raise Unexpected(f"the worker ended with {life.code}; see {life.run.log('train')}")
    return min(sizes), max(sizes)


def _refuse_a_row(life: Life) -> None:
    """Limits the worker's address space until it says that a row does not fit."""
    low, high = _extent(life)
    seen = len(_caught(life.run))
    before = resource.prlimit(life.pid, resource.RLIMIT_AS)
    resource.prlimit(life.pid, resource.RLIMIT_AS, (round(low + LEFT * (high - low)), before[1]))
    try:
        if not life.until(lambda: len(_caught(life.run)) > seen, every_s=AIM_S, timeout_s=300):
            raise Unexpected(f"the worker ended with {life.code}; see {life.run.log('train')}")
    finally:
        with suppress(ProcessLookupError):
            resource.prlimit(life.pid, resource.RLIMIT_AS, before)


def _apart(run: Run, other: Run) -> float:
    """How far the weights of two results are apart: the length of the difference by the length of the weights."""
    from safetensors.numpy import load_file

    difference = size = 0.0
    for path in run.model.glob("*.safetensors"):
        theirs = load_file(other.model / path.name)
        for name, value in load_file(path).items():
            own = value.astype("float64")
            difference += float(((own - theirs[name]) ** 2).sum())
            size += float((own**2).sum())
    return math.sqrt(difference / size)
