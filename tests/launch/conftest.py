from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tunedock.launch.job import Job, JobSpec
from tunedock.launch.local import LocalLauncher
from tunedock.run.record import Run, RunState

FAKE_WORKER = Path(__file__).with_name("fake_worker.py")


class ClosingLauncher(LocalLauncher):
    """Remembers its jobs, so that no log stays open for a later test to be warned of."""

    jobs: ClassVar[list[Job]] = []

    def start(self, spec: JobSpec) -> Job:
        job = super().start(spec)
        self.jobs.append(job)
        return job


@pytest.fixture
def launcher() -> Iterator[Callable[..., LocalLauncher]]:
    """A launcher whose workers do the given steps."""

    def make(*steps: list[Any]) -> LocalLauncher:
        return ClosingLauncher([sys.executable, str(FAKE_WORKER), json.dumps(steps)])

    yield make
    while ClosingLauncher.jobs:
        ClosingLauncher.jobs.pop().close()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    state = RunState("r1", 1.0, "sft", "some/model", "lora", "0123456789abcdef")
    return Run.create(tmp_path / "r1", recipe_yaml="model: x\n", resolved={"recipe": {}, "hash": "x"}, state=state)
