"""The commands with a worker that does as told; tests/cli/test_real_worker.py has the real one."""

from __future__ import annotations

import json
import re

import pytest

from tunedock.errors import DataError
from tunedock.run.pulse import Pulse
from tunedock.run.ranks import Rank, RankFiles
from tunedock.run.record import Run

ACCOUNT = {
    "read": 1000, "kept": 990, "dropped": 10, "reasons": {"empty_answer": 8, "broken_json": 2}, "samples": 990, "cut_rows": 3,
    "cut_tokens": 70, "duplicates": 4, "no_stop": 1, "formats": {"rows.jsonl": "messages"},
    "drops": [["rows.jsonl:3", "empty_answer", "no text [b]\x1b[2J"]] * 8 + [["rows.jsonl:9", "broken_json", "line 9"]] * 2,
    "cuts": [],
}  # fmt: skip
CHECK = {
    "account": ACCOUNT,
    "splits": {"train": {"samples": 800, "tokens": 64000, "trained_tokens": 20000}},
    "histogram": {"edges": [0, 64, 128], "counts": [700, 100]},
    "lengths": {"min": 4, "median": 50, "p95": 110, "max": 128},
    "trained_share": 0.3125,
    "empty_answers": 8,
    "duplicates": 4,
    "no_stop": 1,
    "report": "/somewhere/report",
}
ROW = {
    "row_id": "rows.jsonl:1", "index": 0, "split": None, "example": {"messages": [{"role": "user", "content": "hi"}]},
    "refused": None, "cut_tokens": 0, "has_stop": True, "max_length": 64,
    "leaves": [{"tokens": [{"id": 5, "text": "yo", "weight": 1.0}], "text": "yo"}],
}  # fmt: skip


def result(value):
    return ["event", "result", {"value": value}]


def test_train_tells_its_progress_apart_from_its_result(recipe, tunedock, worker):
    worker(
        ["event", "progress", {"task": "training", "done": 1, "total": 2, "unit": "steps"}],
        ["event", "metrics", {"step": 1, "epoch": 0.5, "values": {"loss": 2.0}}],
        ["event", "warning", {"message": "slow", "hint": "buy more"}],
        result({"steps": 2, "eval_loss": 1.5}),
    )
    code, out, err = tunedock("train", "r.yaml", "train.output_dir=runs/first")
    assert code == 0
    assert "eval loss  1.5" in out
    assert "next: tunedock chat first" in out
    for said in (
        "run directory: ",
        "training: 1/2 steps",
        "step 1  epoch 0.50  loss 2.0000",
        "warning: slow",
        "hint: buy more",
    ):
        assert said in err
    code, out, _ = tunedock("train", "r.yaml", "--json")
    assert json.loads(out)["steps"] == 2
    code, out, _ = tunedock("train", "--resume", "first", "--json")
    assert (code, json.loads(out)["run"]) == (0, str(recipe.parent / "runs" / "first"))


def test_resuming_what_does_not_exist_is_a_run_error(recipe, tunedock):
    code, _, err = tunedock("train", "--resume", "nope")
    assert code == 5
    assert "there is no run `nope`" in err


def test_eval_shows_base_and_tuned_side_by_side(recipe, tunedock, worker):
    worker(result({"steps": 1}))
    tunedock("train", "r.yaml", "train.output_dir=runs/first")
    metrics = {"loss": 2.0, "rouge1": None}
    worker(
        ["request"],
        result({"split": "test", "base": metrics, "tuned": {"loss": 1.25, "rouge1": 0.5}, "answers": [1, 2]}),
    )
    code, out, _ = tunedock("eval", "first", "max_samples=3")
    assert code == 0
    assert out.splitlines()[0].split() == ["metric", "base", "tuned", "change"]
    assert out.splitlines()[1].split() == ["loss", "2", "1.25", "-0.7500"]
    assert out.splitlines()[2].split() == ["rouge1", "-", "0.5"]
    assert "2 answers on the test split" in out
    code, out, _ = tunedock("eval", "first", "--json")
    assert json.loads(out)["tuned"]["loss"] == 1.25


def test_export_passes_its_options(recipe, tunedock, worker):
    worker(result({"steps": 1}))
    tunedock("train", "r.yaml", "train.output_dir=runs/first")
    worker(["request"], result({"largest_difference": 1e-6}))
    code, out, _ = tunedock("export", "first", "--to", "out", "--format", "adapter")
    assert code == 0
    assert "largest difference  1e-06" in out
    told = [json.loads(line) for line in Run(recipe.parent / "runs" / "first").events.read_text().splitlines()]
    request = next(event for event in told if event.get("message") == "request")["data"]["request"]
    assert (request["to"], request["format"], request["quantize"]) == (str(recipe.parent / "out"), "adapter", None)


def test_export_refuses_what_does_not_go_together(recipe, tunedock, worker):
    worker(result({"steps": 1}))
    tunedock("train", "r.yaml", "train.output_dir=runs/first")
    for arguments, says in (
        (["--format", "gguf", "--quantize", "int8"], "it is one of --format hf"),
        (["--quantize", "q4_k_m"], "it is one of --format gguf"),
        (["--format", "adapter", "--quantize", "int8"], "an adapter alone stays in the numbers it was trained in"),
        (["--format", "gguf", "--quantize", "q9"], "`q9` is no kind of --format gguf"),
        (["--format", "gguf", "--dtype", "float16"], "--dtype: it says nothing of --format gguf"),
        (["--system", "hello"], "--system: it says nothing of --format hf"),
        (["--max-shard-size", "lots"], "--max-shard-size: `LOTS` is no size"),
        (["--format", "ollama", "--parameter", "colour=3"], "--parameter: `colour`"),
        (["--format", "ollama", "--parameter", "temperature=hot"], "is not of the form NAME=NUMBER"),
        (["--run", "first"], "--run: `first` says nothing here"),
    ):
        code, _, err = tunedock("export", "first", "--to", "out", *arguments)
        assert (code, says in err) == (2, True), err
    for arguments, number, says in (
        (["first"], 2, "no folder was given to write to"),
        (["first", "out"], 2, "the folder to write to is given by --to"),
        (["verify"], 2, "tunedock export verify DIR"),
        (["verify", "nowhere"], 5, "there is no such folder"),
    ):
        code, _, err = tunedock("export", *arguments)
        assert (code, says in err) == (number, True), err


def test_data_check_shows_the_account(recipe, tunedock, worker):
    worker(result(CHECK))
    code, out, _ = tunedock("data", "check", "r.yaml")
    assert code == 0
    for said in (
        "read        1,000",
        "empty_answer",
        "rows.jsonl:3: no text [b]",
        "20,000",
        "p95 110",
        "tokens trained: 31.2%",
        "messages",
    ):
        assert said in out
    assert "\x1b" not in out
    code, out, _ = tunedock("data", "check", "r.yaml", "--json")
    document = json.loads(out)
    assert (document["read"], document["kept"], document["dropped"], document["reasons"]["broken_json"]) == (
        1000,
        990,
        10,
        2,
    )
    assert document["histogram"] == CHECK["histogram"]


def test_a_failed_account_is_shown_and_then_the_error(recipe, tunedock, worker):
    failure = ["event", "failure", {"error": DataError("too many dropped", where="data.train").to_json()}]
    worker(result(CHECK), failure, ["exit", 3])
    code, out, err = tunedock("data", "check", "r.yaml")
    assert code == 3
    assert "rows.jsonl:3" in out
    assert "error: data.train: too many dropped" in err
    code, out, err = tunedock("data", "check", "r.yaml", "--json")
    assert code == 3
    document = json.loads(out)
    assert document["dropped"] == 10
    assert document["error"]["message"] == "too many dropped"
    worker(failure, ["exit", 3])
    code, out, _ = tunedock("data", "check", "r.yaml", "--json")
    assert (code, list(json.loads(out))) == (3, ["error"])


def test_data_show_on_the_terminal_as_json_and_as_a_page(recipe, tunedock, worker):
    worker(result(ROW))
    code, out, _ = tunedock("data", "show", "r.yaml", "--row", "0")
    assert code == 0
    assert "⟦yo⟧" in out
    _, out, _ = tunedock("data", "show", "r.yaml", "--row", "0", "--json")
    assert json.loads(out) == ROW
    code, out, err = tunedock("data", "show", "r.yaml", "--row", "0", "--html", "row.html")
    assert (code, out) == (0, "")
    assert "page: row.html" in err
    assert "yo</span>" in (recipe.parent / "row.html").read_text()
    code, _, err = tunedock("data", "show", "r.yaml", "--row", "0", "--html", "no/such/folder.html")
    assert code == 8
    assert "no/such/folder.html" in err


def test_recipe_show_has_every_value_and_its_origin(recipe, tunedock):
    code, out, _ = tunedock("recipe", "show", "r.yaml", "train.seed=7")
    assert code == 0
    lines = {line.split()[0]: line.strip().split(maxsplit=2)[1:] for line in out.splitlines() if line.strip()}
    assert lines["model.path"] == ["some/model", "r.yaml:1"]
    assert lines["train.seed"] == ["7", "command line"]
    assert lines["adapter.alpha"] == ["32.0", "derived: twice adapter.r"]
    assert lines["data.max_length"] == ["2048", "default"]
    assert lines["data.train.0.path"][0] == str(recipe.parent / "rows.jsonl")
    _, out, _ = tunedock("recipe", "show", "r.yaml", "--json")
    resolved = json.loads(out)
    assert resolved["recipe"]["train"]["batch_size"] == 16
    assert set(lines) >= set(resolved["origins"])


def test_recipe_show_finds_keys_that_hold_dots(recipe, tunedock):
    recipe.write_text(
        "model: {path: some/model, init: random, config_overrides: {rope.theta: 5, a: {b.c: 6}}}\n"
        "adapter: full\ndata: {train: [./rows.jsonl]}\n"
    )
    _, out, _ = tunedock("recipe", "show", "r.yaml")
    lines = {line.split()[0]: line.split()[1] for line in out.splitlines() if line.strip()}
    assert lines["model.config_overrides.rope.theta"] == "5"
    assert lines["model.config_overrides.a.b.c"] == "6"


def test_recipe_schema_is_json(tunedock):
    code, out, _ = tunedock("recipe", "schema")
    assert code == 0
    assert "train" in json.loads(out)["properties"]


@pytest.fixture
def two_runs(recipe, tunedock, worker):
    worker(["event", "metrics", {"step": 4, "epoch": 1.0, "values": {"loss": 1.5}}], result({"steps": 4}))
    for name, seed in (("first", 1), ("second", 2)):
        assert tunedock("train", "r.yaml", f"train.output_dir=runs/{name}", f"train.seed={seed}")[0] == 0
    return recipe.parent / "runs"


def test_runs_are_listed_shown_and_compared(two_runs, tunedock):
    code, out, _ = tunedock("runs", "list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["name", "second", "first"]
    assert "1.5" in out
    assert [run["name"] for run in json.loads(tunedock("runs", "list", "--json")[1])] == ["second", "first"]
    assert "some/model" in tunedock("runs", "show", "fir")[1]
    assert json.loads(tunedock("runs", "show", "first", "--json")[1])["metrics"]["loss"] == 1.5
    Pulse(Rank(1, 2))._write(RankFiles(two_runs / "first" / "ranks", 1).pulse)
    assert "rank 1" not in tunedock("runs", "show", "first")[1], "it has ended"
    with Run(two_runs / "first").working("train"):
        assert re.search(r"rank 1 .*step 1, starting, 0 s ago", tunedock("runs", "show", "first")[1])
        assert json.loads(tunedock("runs", "show", "first", "--json")[1])["ranks"][0]["rank"] == 1
    code, out, _ = tunedock("runs", "compare", "first", "second")
    assert [line.split() for line in out.splitlines() if line.startswith("train.seed")] == [["train.seed", "1", "2"]]
    compared = json.loads(tunedock("runs", "compare", "first", "second", "--json")[1])
    assert compared["recipe"]["train.seed"] == [1, 2]
    assert tunedock("runs", "compare", "first")[0] == 5


def test_delete_asks_and_without_a_terminal_wants_yes(two_runs, tunedock, monkeypatch):
    code, _, err = tunedock("runs", "delete", "first")
    assert (code, (two_runs / "first").is_dir()) == (2, True)
    assert "--yes" in err
    assert tunedock("runs", "delete", "first", "--yes")[0] == 0
    assert not (two_runs / "first").exists()
    assert (two_runs / "second").is_dir()
    assert tunedock("runs", "delete", "../r.yaml", "--yes")[0] == 5


def test_no_runs_is_no_error(recipe, tunedock):
    assert tunedock("runs", "list") == (0, "", "no runs in runs; `--runs-dir` looks elsewhere\n")
    assert tunedock("runs", "list", "--json")[1] == "[]\n"
