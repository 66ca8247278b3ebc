"""A run on data in an image: by its name at first, and by what it stood for from then on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine_bed import Engine
from inline_worker import InlineLauncher
from tunedock import pipeline
from tunedock.errors import DataError
from tunedock.events import Event
from tunedock.image.engine import connected
from tunedock.pipeline.data_packing import make_data_image
from tunedock.recipe import data_images
from tunedock.run.record import Run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small model and rows in two versions; an empty cache."""
    rows = (ROOT / "examples/demo/triage.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    for name, some in (("v1", rows[:40]), ("v2", rows[40:90])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text("".join(some), encoding="utf-8")
    recipe: dict[str, Any] = {
        "model": {"path": str(ROOT / "examples/demo/base"), "init": "random"},
        "adapter": "full",
        "data": {"max_length": 256, "cache_dir": "./cache"},
        "train": {"max_steps": 2, "batch_size": 4, "report_to": "none", "bf16": False, "output_dir": "./run"},
        "eval": {"max_samples": 1, "max_new_tokens": 2},
    }
    (tmp_path / "r.yaml").write_text(json.dumps(recipe | {"data": {**recipe["data"], "train": f"image://{NAME}"}}))
    monkeypatch.setattr(data_images, "CACHE", tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    return tmp_path


NAME = f"td-run-data-{os.getpid()}:now"


@pytest.fixture
def packed(engine_here: Engine, project: Path) -> Iterator[Callable[[str], str]]:
    def pack(version: str) -> str:
        value = make_data_image(
            str(project / version), tag=NAME, to=None, labels={}, on_event=lambda _: None, launcher=InlineLauncher()
        )
        return str(value["revision"])

    yield pack
    with connected() as client:
        client.images.remove(NAME, force=True)


def test_a_run_goes_on_with_what_its_name_stood_for_when_it_began(project: Path, packed: Callable[[str], str]) -> None:
    events: list[Event] = []
    first = packed("v1")
    assert (
        pipeline.data_check([project / "r.yaml"], on_event=events.append, launcher=InlineLauncher())["account"]["read"]
        == 40
    )
    assert [event["message"] for event in events if event["kind"] == "note"] == [f"image://{NAME} is {first}"]
    run = Run(pipeline.train([project / "r.yaml"], launcher=InlineLauncher()).run)
    lineage = run.state().lineage
    assert lineage["data_images"] == {f"image://{NAME}": first}

    assert packed("v2") != first
    again = Run(pipeline.train([project / "r.yaml"], ["train.output_dir=new"], launcher=InlineLauncher()).run)
    assert again.state().lineage["data"] != lineage["data"]
    assert pipeline.evaluate(run, launcher=InlineLauncher()).value["split"] == "test"
    assert run.state().lineage == lineage

    shutil.rmtree(project / "images")
    with pytest.raises(DataError, match=f"and {first} is asked for"):
        pipeline.evaluate(run, launcher=InlineLauncher())


def test_written_to_a_file_and_named_by_revision(project: Path, packed: Callable[[str], str]) -> None:
    first = packed("v1")
    to = project / "v2.tar"
    value = make_data_image(
        str(project / "v2"), tag=NAME, to=to, labels={}, on_event=lambda _: None, launcher=InlineLauncher()
    )
    assert (value["name"], value["rows"], value["file"]) == (NAME, 50, str(to))
    source = ["data.train.0.revision=" + first]
    account = pipeline.data_check([project / "r.yaml"], source, launcher=InlineLauncher())["account"]
    assert account["read"] == 40
    with pytest.raises(DataError, match=f"the name stands for {first} now"):
        pipeline.data_check(
            [project / "r.yaml"], [f"data.train.0.revision={value['revision']}"], launcher=InlineLauncher()
        )
