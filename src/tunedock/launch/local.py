"""Jobs on this machine: a worker is a process, and a training over several processes those that torchrun starts."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from tunedock.launch.job import Job, JobSpec
from tunedock.launch.many import RanksJob, crew_of
from tunedock.launch.process import start_process, worker_environment

WORKER = (sys.executable, "-P", "-m", "tunedock.worker")
"""`-P` keeps the working directory off the module path: a stray `torch.py` beside the recipe must not run in our name."""


class LocalLauncher:
    """Starts workers by `command + (stage, run directory or "-")`."""

    def __init__(self, command: Sequence[str] = WORKER) -> None:
        self._command = tuple(command)

    def start(self, spec: JobSpec) -> Job:
        """Raises DiskError when the log cannot be written, BugError when the process cannot be started."""
        crew = crew_of(spec)
        if crew is not None:
            return RanksJob(spec, crew, self._command)
        place = "-" if spec.run is None else str(spec.run)
        return start_process(spec, [*self._command, spec.stage, place], worker_environment(os.environ))
