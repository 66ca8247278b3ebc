"""What every fault is made of: a run nobody disturbs, one that is disturbed, and what the second came to beside the first."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.chaos import project
from benchmarks.chaos.life import Life, Steps, begin, fingerprint, lost_steps
from benchmarks.chaos.project import Shape
from tunedock.run.record import Run


class CannotBe(Exception):  # noqa: N818 - a reason, not a mistake
    """This machine has not what a fault needs."""


class Unexpected(Exception):  # noqa: N818 - what is looked for here
    """The run did not take a fault as it should have."""


@dataclass(frozen=True, slots=True)
class Outcome:
    fault: str
    injected: int
    """0 where it was left out; the note says why."""
    lost_steps: int
    """Done again, of all."""
    identical: bool | None
    """Whether model, optimizer and progress are those of the run nobody disturbed; None where it was left out."""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Trial:
    """What a fault is given: its name in the table, room, chance, and how often it is to be injected."""

    fault: str
    folder: Path
    draw: random.Random
    times: int

    def undisturbed(self, shape: Shape) -> dict[str, str]:
        """What the run comes to that nobody disturbs."""
        return fingerprint(self.undisturbed_run(shape))

    def undisturbed_run(self, shape: Shape) -> Run:
        run = project.write(self.folder / "undisturbed", shape)
        expect(begin(run, resume=False), 0)
        return run

    def disturbed(self, shape: Shape, name: str = "disturbed") -> Run:
        """The same run, not begun yet."""
        return project.write(self.folder / name, shape)

    def replayed(self, shape: Shape, run: Run) -> dict[str, str]:
        """What the run comes to that nobody disturbs and whose rows, from the first step on, are as large as those of `run`
        were in the end: it is given that one's record of token budgets."""
        from tunedock.train.planning import RECORD

        twin = project.write(self.folder / "replayed", shape)
        shutil.copy(run.path / RECORD, twin.path / RECORD)
        expect(begin(twin, resume=True), 0)
        return fingerprint(twin)

    def finished(self, run: Run, wanted: dict[str, str], note: str = "") -> Outcome:
        """Goes on with the run to its end, and compares."""
        expect(begin(run, resume=True), 0)
        return self.outcome(run, wanted, note)

    def outcome(self, run: Run, wanted: dict[str, str], note: str = "") -> Outcome:
        """Of a run that is finished."""
        return Outcome(self.fault, self.times, lost_steps(run), fingerprint(run) == wanted, note)


Inject = Callable[[Trial], Outcome]


@dataclass(frozen=True, slots=True)
class Fault:
    name: str
    """In the table."""
    inject: Inject
    """Raises CannotBe; Unexpected."""


def expect(life: Life, code: int, *, timeout_s: float = 1800.0) -> None:
    found = life.wait(timeout_s)
    if found != code:
        raise Unexpected(f"the worker ended with {found}, not {code}; see {life.run.log('train')}")


def at_work(life: Life, more: int = 1) -> bool:
    """Waits for so many more steps. False where the run ended before."""
    count = Steps(life.run)
    before = count()
    return life.until(lambda: count() >= before + more)


def still_at_work(life: Life, more: int = 1) -> None:
    """As `at_work`; a run that ends before its fault has been injected as often as it should is a mistake of the fault."""
    if not at_work(life, more):
        raise Unexpected(f"the worker ended with {life.code} before it could be disturbed; see {life.run.log('train')}")


def newest(run: Run) -> int:
    """The step of the newest whole checkpoint; 0 where there is none."""
    whole = run.checkpoints.glob("step-*/manifest.json")
    return max((int(path.parent.name.removeprefix("step-")) for path in whole), default=0)


def until_saved(life: Life, step: int) -> None:
    """Waits for a whole checkpoint of this step or a later one."""
    if not life.until(lambda: newest(life.run) >= step):
        raise Unexpected(f"the worker ended with {life.code} before step {step}; see {life.run.log('train')}")
