"""The pipeline with a real recipe and a worker that does as told. (tests/cli/test_commands.py runs the real worker.)"""

from __future__ import annotations

import fcntl
import json
import signal
from pathlib import Path

import pytest

from tunedock import pipeline
from tunedock.errors import DataError, InterruptedRun, OutOfMemoryError, RecipeError, RunError
from tunedock.recipe.exporting import Order
from tunedock.run.record import Run


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"messages": []}\n')
    path = tmp_path / "r.yaml"
    path.write_text("model: some/model\ndata: {train: ./rows.jsonl}\ntrain: {learning_rate: 1.0e-4}\n")
    return path


RESULT = ["event", "result", {"value": {"steps": 3}}]


def test_training_makes_the_run_and_returns_the_result(recipe, launcher):
    events = []
    outcome = pipeline.train([recipe], ["train.seed=7"], on_event=events.append, launcher=launcher(["request"], RESULT))
    run = Run.open(outcome.run)
    assert outcome.to_json() == {"steps": 3, "run": str(run.path)}
    assert run.path.parent == recipe.parent / "runs"
    assert run.resolved()["recipe"]["train"]["seed"] == 7
    assert (run.state().objective, run.state().model, run.state().adapter) == ("sft", "some/model", "lora")
    assert run.state().recipe_hash == run.resolved()["hash"]
    assert events[0]["data"]["run"] == str(run.path)
    assert next(e for e in events if e.get("message") == "request")["data"]["request"] == {"resume": False}


def test_runs_started_in_the_same_second_get_different_directories(recipe, launcher):
    paths = {pipeline.train([recipe], launcher=launcher(RESULT)).run for _ in range(3)}
    assert len(paths) == 3


def test_a_run_directory_in_use_is_refused(recipe, launcher):
    given = [f"train.output_dir={recipe.parent / 'mine'}"]
    pipeline.train([recipe], given, launcher=launcher(RESULT))
    with pytest.raises(RunError, match="in use"):
        pipeline.train([recipe], given, launcher=launcher(RESULT))


def test_the_run_of_a_worker_that_died_says_so(recipe, launcher):
    with pytest.raises(OutOfMemoryError):
        pipeline.train([recipe], ["train.output_dir=mine"], launcher=launcher(["signal", signal.SIGKILL]))
    state = Run(Path("mine")).state()
    assert (state.status, state.stage, state.exit_code, state.error["kind"]) == (
        "failed",
        "train",
        7,
        "OutOfMemoryError",
    )


def test_a_run_stopped_before_its_worker_listened_is_interrupted(recipe, launcher):
    with pytest.raises(InterruptedRun):
        pipeline.train([recipe], ["train.output_dir=mine"], launcher=launcher(["signal", signal.SIGINT]))
    assert Run(Path("mine")).state().status == "interrupted"


def test_resuming_keeps_the_recipe_of_the_run(recipe, launcher):
    run = Run(pipeline.train([recipe], launcher=launcher(RESULT)).run)
    events = []
    again = launcher(["request"], RESULT)
    for files in ([], [recipe]):
        events.clear()
        assert pipeline.train(files, resume=run, on_event=events.append, launcher=again).run == run.path
        assert next(e for e in events if e.get("message") == "request")["data"]["request"] == {"resume": True}
    with pytest.raises(RecipeError, match=r"`train.learning_rate` was 0.0001, is 0.5"):
        pipeline.train([recipe], ["train.learning_rate=0.5"], resume=run, launcher=again)
    with pytest.raises(RecipeError, match="keeps its recipe, but for where it is trained"):
        pipeline.train([], ["train.learning_rate=0.5"], resume=run, launcher=again)


def test_a_run_at_work_is_not_started_again(recipe, launcher):
    run = Run(pipeline.train([recipe], launcher=launcher(RESULT)).run)
    with (run.path / "run.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="at work"):
            pipeline.train([], resume=run, launcher=launcher(RESULT))


def test_eval_overrides_are_checked_like_a_recipe(recipe, launcher):
    run = Run(pipeline.train([recipe], launcher=launcher(RESULT)).run)
    events = []
    pipeline.evaluate(
        run,
        split="validation",
        overrides=["max_samples=5", "eval.temperature=0.5"],
        on_event=events.append,
        launcher=launcher(["request"], RESULT),
    )
    request = next(e for e in events if e.get("message") == "request")["data"]["request"]
    assert request["split"] == "validation"
    assert request["overrides"]["max_samples"] == 5
    assert request["overrides"]["temperature"] == 0.5
    with pytest.raises(RecipeError, match="max_sample"):
        pipeline.evaluate(run, overrides=["max_sample=5"], launcher=launcher(RESULT))
    with pytest.raises(RecipeError):
        pipeline.evaluate(run, overrides=["max_samples=many"], launcher=launcher(RESULT))


def test_a_failed_evaluation_does_not_change_what_training_left(recipe, launcher):
    run = Run(pipeline.train([recipe], launcher=launcher(RESULT)).run)
    before = run.state()
    with pytest.raises(OutOfMemoryError):
        pipeline.evaluate(run, launcher=launcher(["signal", signal.SIGKILL]))
    assert run.state() == before


def test_export_refuses_a_folder_in_use_before_any_work(recipe, launcher, tmp_path):
    run = Run(pipeline.train([recipe], launcher=launcher(RESULT)).run)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(RunError, match="in use"):
        pipeline.export(run, Order(to=str(tmp_path / "full")), launcher=launcher(RESULT))
    assert pipeline.export(run, Order(to=str(tmp_path / "new")), launcher=launcher(RESULT)).value == {"steps": 3}


def test_a_data_check_that_fails_tells_its_result_first(recipe, launcher):
    account = {"read": 2, "kept": 1, "dropped": 1}
    failure = DataError("1 of 2 rows dropped").to_json()
    steps = [["event", "result", {"value": {"account": account}}], ["event", "failure", {"error": failure}]]
    events = []
    with pytest.raises(DataError, match="1 of 2"):
        pipeline.data_check([recipe], on_event=events.append, launcher=launcher(*steps, ["exit", 3]))
    assert [event["kind"] for event in events] == ["stage", "result", "failure"]


@pytest.mark.parametrize("row", ["12", "rows.jsonl:3", "a:b.jsonl:3", "rows.parquet:#7"])
def test_rows_are_named_by_number_or_place(recipe, launcher, row):
    events = []
    pipeline.data_show([recipe], row=row, on_event=events.append, launcher=launcher(["request"], RESULT))
    request = next(e for e in events if e.get("message") == "request")["data"]["request"]
    assert request["row"] == row
    assert json.dumps(request["recipe"])


@pytest.mark.parametrize("row", ["", "-1", "x", "file:", ":3", "file:x", "1.5"])
def test_what_names_no_row_is_refused(recipe, launcher, row):
    with pytest.raises(RecipeError, match="names no row"):
        pipeline.data_show([recipe], row=row, launcher=launcher(RESULT))
