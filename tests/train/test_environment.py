"""What a run is computed with: written down, and told where it is other than before."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from tunedock.events import Emitter
from tunedock.recipe.schema import Recipe
from tunedock.run.record import Run
from tunedock.run.stop import StopRequest
from tunedock.train.environment import FILE, changes, keep_environment
from tunedock.train.training import Training


def kept(folder: Path, *, resume: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The file, and what was told."""
    stream = io.StringIO()
    recipe = Recipe.model_validate({"model": "m", "data": {"train": "rows.jsonl"}})
    keep_environment(Training(Run(folder), recipe, Emitter(stream), StopRequest(), resume=resume))
    return json.loads((folder / FILE).read_text()), [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_run_that_goes_on_as_it_was_says_nothing(tmp_path: Path) -> None:
    first, told = kept(tmp_path, resume=False)
    assert first["kernels"] and first["versions"]["torch"] and told == []
    again, told = kept(tmp_path, resume=True)
    assert again == first and told == []


def test_kernels_that_do_not_load_any_more_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept(tmp_path, resume=False)
    monkeypatch.setattr("tunedock.train.environment.status", lambda: "no C++ compiler")
    now, (warning,) = kept(tmp_path, resume=True)
    assert warning["kind"] == "warning" and warning["message"].endswith("is no C++ compiler")
    assert now["kernels"] == "no C++ compiler"
    assert kept(tmp_path, resume=True)[1] == [], "it is told once"


def test_what_counts() -> None:
    before = {"versions": {"torch": "2.13.0", "rich": "1"}, "hardware": {"cpu": "a", "cores": 2, "gpus": []}}
    now = {
        "versions": {"torch": "2.14.0", "rich": "2"},
        "hardware": {"cpu": "a", "cores": 2, "gpus": [{"name": "H200"}]},
        "kernels": "compiled with c++",
    }
    assert list(changes(before, now)) == ["torch was 2.13.0, is 2.14.0", "gpus was none, is H200"]
