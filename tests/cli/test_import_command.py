"""`tunedock recipe import`: the recipe on standard output or in a file, the report beside it, one document with --json."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tunedock.recipe.load import load

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A LLaMA-Factory file in a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text('{"mine": {"file_name": "rows.json"}}')
    (tmp_path / "data" / "rows.json").write_text('[{"instruction": "Q", "output": "A"}]')
    path = tmp_path / "theirs.yaml"
    path.write_text("model_name_or_path: some/model\ndataset: mine\nlora_rank: 4\nplot_loss: true\ntemplate: llama3\n")
    return path


def test_the_recipe_is_the_output_and_the_report_beside_it(theirs: Path, tunedock: Command) -> None:
    code, out, err = tunedock("recipe", "import", "theirs.yaml")
    assert code == 0
    (theirs.parent / "ours.yaml").write_text(out)
    assert load([theirs.parent / "ours.yaml"]).recipe.data.train[0].path == "data/rows.json"
    for said in ("lora_rank: 4", "adapter.r: 4", "left out", "every run draws its losses", "LLaMA-Factory's default"):
        assert said in err
    assert "ours.yaml" not in err


def test_the_recipe_goes_to_a_new_file(theirs: Path, tunedock: Command) -> None:
    code, out, _ = tunedock("recipe", "import", "theirs.yaml", "--to", "ours.yaml")
    assert code == 0
    assert "wrote ours.yaml" in out
    assert "adapter.r: 4" in out
    code, shown, _ = tunedock("recipe", "show", "ours.yaml", "--json")
    assert code == 0
    assert json.loads(shown)["recipe"]["train"]["lr_scheduler_type"] == "linear"
    code, _, err = tunedock("recipe", "import", "theirs.yaml", "--to", "ours.yaml")
    assert code == 2
    assert "there is a file already" in err


def test_as_json(theirs: Path, tunedock: Command) -> None:
    code, out, _ = tunedock("recipe", "import", "theirs.yaml", "--json")
    document = json.loads(out)
    assert code == 0
    assert document["recipe"]["adapter"] == {"kind": "lora", "r": 4}
    keys = {line["key"] for line in document["report"]}
    assert {
        "model_name_or_path",
        "dataset",
        "lora_rank",
        "plot_loss",
        "template",
        "dataset_info.json: mine.file_name",
    } <= keys
    assert document["not_built"] == []
    assert document["to"] is None


def test_what_is_not_built_stands_in_the_recipe_and_is_said(theirs: Path, tunedock: Command) -> None:
    theirs.write_text(theirs.read_text() + "report_to: all\n")
    code, out, err = tunedock("recipe", "import", "theirs.yaml")
    assert code == 0
    assert "report_to: [all]" in out
    assert "refuses train.report_to by name" in err


def test_what_cannot_be_said_is_refused_by_name_and_nothing_is_written(theirs: Path, tunedock: Command) -> None:
    theirs.write_text(theirs.read_text() + "use_badam: true\n")
    code, out, err = tunedock("recipe", "import", "theirs.yaml", "--to", "ours.yaml")
    assert code == 2
    assert "error: theirs.yaml:6: `use_badam: true`: this optimizer is not built" in err
    assert "use_badam: true" in out, "the report is there all the same"
    assert not (theirs.parent / "ours.yaml").exists()
    code, out, _ = tunedock("recipe", "import", "theirs.yaml", "--json")
    document = json.loads(out)
    assert code == 2
    assert document["error"]["kind"] == "NotBuiltError"
    assert any(line["outcome"] == "refused" for line in document["report"])


def test_another_place_of_dataset_info(theirs: Path, tunedock: Command) -> None:
    (theirs.parent / "data").rename(theirs.parent / "elsewhere")
    code, _, err = tunedock("recipe", "import", "theirs.yaml")
    assert code == 2
    assert "--dataset-info" in err
    code, out, _ = tunedock("recipe", "import", "theirs.yaml", "--dataset-info", "elsewhere", "--json")
    assert code == 0
    assert json.loads(out)["recipe"]["data"]["train"][0]["path"] == "elsewhere/rows.json"


def test_a_file_that_is_not_there(theirs: Path, tunedock: Command) -> None:
    code, _, err = tunedock("recipe", "import", "their.yaml")
    assert code == 2
    assert "there is no such file" in err
    assert "theirs.yaml" in err
