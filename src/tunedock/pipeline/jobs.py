"""Jobs launched and watched: events go to whoever listens, the result comes back, or the error the stage failed with."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunedock.errors import BugError, DiskError, TunedockError
from tunedock.launch.at_work import refuse_at_work
from tunedock.launch.end import record_end
from tunedock.launch.job import JobSpec, Launcher
from tunedock.launch.places import launcher_for, launcher_of
from tunedock.launch.supervise import supervise
from tunedock.launch.watch import OnEvent, watch
from tunedock.pipeline.data_images import bring_for
from tunedock.recipe.launch import Launch
from tunedock.run.record import Run

READS_DATA = ("train", "eval")


@dataclass(frozen=True, slots=True)
class Outcome:
    """A finished stage of a run."""

    run: Path
    value: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {**self.value, "run": str(self.run)}


def default_launcher() -> Launcher:
    """Of what is asked without a run: it is asked here."""
    return launcher_for(Launch())


def run_job(spec: JobSpec, on_event: OnEvent, launcher: Launcher | None) -> dict[str, Any]:
    launcher = launcher or default_launcher()
    if spec.stage == "train":
        value = supervise(launcher, spec, on_event)
    else:
        job = launcher.start(spec)
        try:
            value = watch(job, on_event)
        finally:
            job.close()
    return value if isinstance(value, dict) else {"value": value}


def run_stage(spec: JobSpec, on_event: OnEvent, launcher: Launcher | None) -> Outcome:
    """A stage of a run. A worker that died without a word cannot write its own end, so it is written here."""
    if spec.run is None:
        raise BugError(f"`{spec.stage}` needs a run")
    run = Run(spec.run)
    refuse_at_work(run)
    try:
        if spec.stage in READS_DATA:
            bring_for(run, on_event)
        value = run_job(spec, on_event, launcher or launcher_of(run))
    except TunedockError as error:
        with suppress(DiskError):  # where that is the error, it must not take the place of what the worker said
            record_end(run, spec.stage, error)
        raise
    return Outcome(run.path, value)
