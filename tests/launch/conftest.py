from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunedock.launch.local import LocalLauncher
from tunedock.run.record import Run, RunState

FAKE_WORKER = Path(__file__).with_name("fake_worker.py")


@pytest.fixture
def launcher() -> Callable[..., LocalLauncher]:
    """A launcher whose workers do the given steps."""

    def make(*steps: list[Any]) -> LocalLauncher:
        return LocalLauncher([sys.executable, str(FAKE_WORKER), json.dumps(steps)])

    return make


@pytest.fixture
def run(tmp_path: Path) -> Run:
    state = RunState("r1", 1.0, "sft", "some/model", "lora", "0123456789abcdef")
    return Run.create(tmp_path / "r1", recipe_yaml="model: x\n", resolved={"recipe": {}, "hash": "x"}, state=state)
