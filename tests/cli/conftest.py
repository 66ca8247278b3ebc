from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunedock.cli.app import main
from tunedock.launch.local import LocalLauncher

FAKE_WORKER = Path(__file__).parents[1] / "launch" / "fake_worker.py"


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe that resolves, in a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"messages": []}\n')
    path = tmp_path / "r.yaml"
    path.write_text("model: some/model\ndata: {train: ./rows.jsonl}\n")
    return path


@pytest.fixture
def tunedock(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command in this process: (exit code, standard output, standard error)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        written = capsys.readouterr()
        return int(ended.value.code or 0), written.out, written.err

    return run


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """From now on, workers do these steps (tests/launch/fake_worker.py)."""

    def does(*steps: list[Any]) -> None:
        command = [sys.executable, str(FAKE_WORKER), json.dumps(steps)]
        monkeypatch.setattr("tunedock.launch.places.LocalLauncher", functools.partial(LocalLauncher, command))

    return does
