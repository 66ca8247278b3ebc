"""What an image says of the run it was made for, and what of the run goes into it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tunedock.errors import RunError
from tunedock.events import encode
from tunedock.pipeline.run_labels import labels_of, served_by
from tunedock.run.record import Run, RunState


@pytest.fixture
def run(tmp_path: Path) -> Run:
    state = RunState("a", 1.0, "sft", "some/model", "lora", "0123", lineage={"commit": "c0ffee", "data": "f1n9"})
    base = tmp_path / "base"
    base.mkdir()
    resolved: dict[str, Any] = {"recipe": {"model": {"path": str(base)}}, "origins": {}, "hash": "0123"}
    made = Run.create(tmp_path / "runs/a", recipe_yaml="model: x\n", resolved=resolved, state=state)
    event = {"kind": "metrics", "time": 1.0, "step": 2, "epoch": 1.0, "values": {"loss": 0.5, "eval_loss": 0.75}}
    made.events.write_text(encode(event))
    return made


def test_recipe_data_adapter_and_metrics(run: Run) -> None:
    found = labels_of("a", run.path.parent)
    assert found["io.tunedock.run"] == "a"
    assert found["io.tunedock.recipe-hash"] == "0123"
    assert found["io.tunedock.data-fingerprint"] == "f1n9"
    assert found["io.tunedock.model-commit"] == "c0ffee"
    assert found["io.tunedock.adapter"] == "lora"
    assert json.loads(found["io.tunedock.metrics"])["eval_loss"] == 0.75


def test_an_adapter_goes_with_its_base_where_that_is_a_folder(run: Run) -> None:
    with pytest.raises(RunError, match="no result yet"):
        served_by("a", run.path.parent)
    run.model.mkdir()
    assert served_by("a", run.path.parent) == (str(run.model), None)
    (run.model / "adapter_config.json").write_text("{}")
    assert served_by("a", run.path.parent) == (str(run.path.parent.parent / "base"), str(run.model))


def test_no_such_run(tmp_path: Path) -> None:
    with pytest.raises(RunError):
        labels_of("none", tmp_path)
