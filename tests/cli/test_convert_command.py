"""`tunedock data convert` as typed: sources, recipes, entries of a dataset_info.json; what fails, and what stands there then."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from inline_worker import InlineLauncher
from tunedock.cli import convert
from tunedock.recipe.conversion import Format, Order, Part, Spelling

ROW = {"instruction": "q", "input": "more", "output": "a"}
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tunedock.launch.places.LocalLauncher", InlineLauncher)
    (tmp_path / "rows.json").write_text(json.dumps([ROW, ROW, {"instruction": "q", "output": ""}]))
    (tmp_path / "good.json").write_text(json.dumps([ROW, ROW]))
    entries: dict[str, Any] = {
        "mine": {
            "file_name": "good.json",
            "columns": {"prompt": "instruction", "response": "output"},
            "num_samples": 1,
        },
        "pairs": {
            "file_name": "pairs.json",
            "ranking": True,
            "columns": {"prompt": "q", "chosen": "good", "rejected": "bad"},
        },
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(entries))
    (tmp_path / "pairs.json").write_text(json.dumps([{"q": "q", "good": "yes", "bad": "no"}]))
    (tmp_path / "r.yaml").write_text(
        "model: some/model\ndata: {train: ./good.json, system: Be kind., train_on: last}\n"
    )
    return tmp_path


def lines(name: str) -> list[Any]:
    return [json.loads(line) for line in Path(name).read_text(encoding="utf-8").splitlines()]


def test_the_account_and_the_file(folder: Path, tunedock: Run) -> None:
    code, out, err = tunedock("data", "convert", "good.json", "--to", "messages", "--out", "out.jsonl")
    assert code == 0, err
    assert [line.split() for line in out.splitlines()[1:4]] == [["read", "2"], ["written", "2"], ["refused", "0"]]
    assert f"wrote {folder}/out.jsonl: 2 row(s), messages" in out
    assert lines("out.jsonl")[0]["messages"][0]["content"] == "q\nmore"


def test_a_refused_row_fails_it_unless_allowed(folder: Path, tunedock: Run) -> None:
    given = ("data", "convert", "rows.json", "--to", "messages", "--out", "out.jsonl", "--refused", "no.jsonl")
    code, out, err = tunedock(*given)
    assert code == 3
    assert "rows.json:#3: `output` says nothing" in out
    assert [line.split() for line in out.splitlines()[1:4]] == [
        ["read", "3"],
        ["could", "be", "written", "2"],
        ["refused", "1"],
    ]
    assert "error: rows.json:#3: 1 of 3 rows cannot be written as `messages`, so nothing was: empty_answer 1" in err
    assert not Path("out.jsonl").exists()
    assert lines("no.jsonl")[0]["row_id"] == "rows.json:#3"
    code, out, _ = tunedock(*given, "--force", "--json")
    document = json.loads(out)
    assert (code, document["refused"], document["out"], document["error"]["kind"]) == (3, 1, None, "DataError")
    code, out, _ = tunedock(*given, "--force", "--max-dropped", "0.5", "--json")
    assert (code, json.loads(out)["written"]) == (0, 2)


def test_a_recipe_gives_its_training_data_as_it_trains_on_them(folder: Path, tunedock: Run) -> None:
    code, _, err = tunedock(
        "data", "convert", "r.yaml", "data.train.0.num_samples=1", "--to", "alpaca", "--out", "out.jsonl"
    )
    assert code == 0, err
    assert lines("out.jsonl") == [{"instruction": "q\nmore", "input": "", "output": "a", "system": "Be kind."}]
    for given, said in (
        (["r.yaml", "--format", "alpaca"], "the recipe says this"),
        (["r.yaml", "--train-on", "last"], "the recipe says this"),
        (["r.yaml", "good.json"], "`good.json` is no recipe"),
    ):
        code, _, err = tunedock("data", "convert", *given, "--to", "messages", "--out", "other.jsonl")
        assert code == 2
        assert said in err


def test_entries_of_a_dataset_info(folder: Path, tunedock: Run) -> None:
    code, _, err = tunedock("data", "convert", "dataset_info.json#mine", "--to", "messages", "--out", "out.jsonl")
    assert code == 0
    assert "LLaMA-Factory draws them" in err
    assert [row["messages"][0]["content"] for row in lines("out.jsonl")] == ["q"], "`input` is not read, and one row is"
    code, _, err = tunedock("data", "convert", "dataset_info.json#pairs", "--to", "labelled", "--out", "kto.csv")
    assert code == 0, err
    assert Path("kto.csv").read_text().splitlines()[1:] == ['"q","yes","true","",""', '"q","no","false","",""']
    code, _, err = tunedock("data", "convert", "dataset_info.json#mines", "--to", "messages", "--out", "x.jsonl")
    assert (code, "did you mean `mine`?" in err) == (2, True)


def test_columns_and_limits_of_a_source(folder: Path, tunedock: Run) -> None:
    Path("de.csv").write_text("frage,antwort\nwas,das\nwer,der\n")
    given = ("data", "convert", "de.csv", "--to", "alpaca", "--out", "out.csv")
    code, _, err = tunedock(*given)
    assert (code, "the columns are frage, antwort" in err) == (3, True)
    code, out, _ = tunedock(
        *given, "--columns", "prompt=frage", "--columns", "completion=antwort", "--num-samples", "1", "--json"
    )
    assert (code, json.loads(out)["rows"]) == (0, 1)
    code, _, err = tunedock(*given, "--columns", "prompt")
    assert (code, "OURS=THEIRS" in err) == (2, True)


def test_the_choices_are_those_of_the_worker() -> None:
    assert tuple(convert.Format) == get_args(Format)
    assert tuple(convert.Part) == get_args(Part)
    assert tuple(convert.Spelling) == get_args(Spelling)
    assert set(convert.Trained) <= set(get_args(Order.model_fields["train_on"].annotation))
