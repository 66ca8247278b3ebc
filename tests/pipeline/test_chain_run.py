"""A chain run for real, and what each kind of change makes of the next call."""

from __future__ import annotations

import json
import shutil

import pytest
from project import write_project

import tunedock.pipeline.chain_plan as planning
from inline_worker import InlineLauncher
from tunedock.errors import DataError, InterruptedRun, RecipeError, RunError
from tunedock.pipeline.chain import run_chain
from tunedock.pipeline.chain_state import ChainState
from tunedock.run.record import Run

STAGES = ["sft", "dpo", "scores", "model"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A project whose chain has run."""
    folder = tmp_path_factory.mktemp("chains") / "whole"
    chain = write_project(folder)
    run_chain(chain, folder=folder / "runs", launcher=InlineLauncher())
    return folder


@pytest.fixture
def project(whole, tmp_path):
    """A copy of it."""
    return shutil.copytree(whole, tmp_path / "copy", symlinks=True)


def call(folder, *overrides, dry=True, **options):
    return run_chain(
        folder / "chain.yaml", overrides, folder=folder / "runs", dry=dry, launcher=InlineLauncher(), **options
    )


def actions(folder, *overrides, **options):
    return {done.name: done.action for done in call(folder, *overrides, **options)}


def reason(folder, stage, *overrides, **options):
    return next(done.why for done in call(folder, *overrides, **options) if done.name == stage)


def test_every_stage_is_a_run_or_a_result(whole):
    state = ChainState(whole / "runs")
    assert {name: record.status for name, record in state.records.items()} == dict.fromkeys(STAGES, "finished")
    for name in ("sft", "dpo"):
        assert Run(whole / "runs" / name).state().status == "finished"
    assert (whole / "runs" / "sft" / "model" / "adapter_config.json").is_file()
    dpo = Run(whole / "runs" / "dpo").resolved()["recipe"]
    assert dpo["model"]["path"] == str(whole / "runs" / "models" / "sft")
    assert (whole / "exported" / "model.safetensors").is_file()
    scores = json.loads((whole / "runs" / "scores.json").read_text())
    assert len(scores["answers"]) == 1
    assert not list((whole).glob(".exported*"))


def test_nothing_is_done_twice_not_even_elsewhere(whole, project):
    for folder in (whole, project):
        assert actions(folder) == dict.fromkeys(STAGES, "skip")
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.name != "chain.json"}
    done = call(whole, dry=False)
    assert [one.action for one in done] == ["skip"] * 4
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.name != "chain.json"} == before


def test_a_key_reruns_its_stage_and_what_follows(project):
    change = "dpo.train.learning_rate=2e-4"
    assert actions(project, change) == {"sft": "skip", "dpo": "run", "scores": "skip", "model": "run"}
    assert reason(project, "dpo", change) == "what changed: train.learning_rate 0.0001 -> 0.0002"
    assert reason(project, "model", change) == "`dpo` runs before it"
    assert set(actions(project, "defaults.train.seed=3").values()) == {"run"}


def test_a_key_that_changes_no_result_reruns_nothing(project):
    assert set(actions(project, "sft.train.logging_steps=5", "sft.train.save_total_limit=1").values()) == {"skip"}


def test_a_row_reruns_what_reads_it(project):
    rows = (project / "pairs.jsonl").read_text().splitlines(keepends=True)
    (project / "pairs.jsonl").write_text("".join([*rows[1:], rows[0]]))
    assert actions(project) == {"sft": "skip", "dpo": "run", "scores": "skip", "model": "run"}
    assert reason(project, "dpo") == "what changed: the content of pairs.jsonl"
    (project / "pairs.jsonl").write_text("".join(rows))
    assert set(actions(project).values()) == {"skip"}


def test_options_of_an_evaluation_rerun_it_alone(project):
    change = "scores.max_new_tokens=5"
    assert actions(project, change) == {"sft": "skip", "dpo": "skip", "scores": "run", "model": "skip"}
    assert reason(project, "scores", change) == "what changed: eval.max_new_tokens 4 -> 5"


def test_another_version_reruns_all(project, monkeypatch):
    monkeypatch.setattr(planning, "__version__", "9.9.9")
    assert set(actions(project).values()) == {"run"}
    assert "tunedock" in reason(project, "sft") and "-> 9.9.9" in reason(project, "sft")


@pytest.mark.parametrize(
    ("file", "reruns"),
    [
        ("runs/sft/model/adapter_model.safetensors", {"sft", "dpo", "scores", "model"}),
        ("runs/dpo/model/model.safetensors", {"dpo", "model"}),
        ("runs/scores.json", {"scores"}),
        ("exported/config.json", {"model"}),
        ("runs/models/sft/model.safetensors", set()),
    ],
)
def test_what_was_deleted_is_made_again(project, file, reruns):
    (project / file).unlink()
    assert {name for name, action in actions(project).items() if action == "run"} == reruns
    if reruns:
        assert f"{project / file} is gone" in {done.why for done in call(project)}


def test_a_file_cut_short_is_seen(project):
    file = project / "exported" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "was changed" in reason(project, "model")


def test_a_stage_run_anew_leaves_the_earlier_run(project):
    before = (project / "exported" / "model.safetensors").read_bytes()
    done = call(project, "dpo.train.learning_rate=3e-4", dry=False, first="dpo")
    assert {one.name: one.action for one in done} == {"sft": "leave", "dpo": "run", "scores": "skip", "model": "run"}
    assert Run(project / "runs" / "dpo-2").resolved()["recipe"]["train"]["learning_rate"] == 3e-4
    assert Run(project / "runs" / "dpo").state().status == "finished"
    assert (project / "exported" / "model.safetensors").read_bytes() != before
    assert set(actions(project, "dpo.train.learning_rate=3e-4").values()) == {"skip"}


def test_a_stage_alone(project):
    change = "defaults.train.seed=5"
    assert actions(project, change, only="dpo") == {"sft": "leave", "dpo": "run", "scores": "leave", "model": "leave"}
    shutil.rmtree(project / "runs" / "sft")
    with pytest.raises(RunError, match=r"`dpo` needs the result of `sft`, which is left out.*is gone"):
        call(project, change, only="dpo")
    with pytest.raises(RunError, match="`dpo` needs the result of `sft`"):
        call(project, first="dpo", dry=False)


def test_an_export_takes_no_folder_that_is_not_its_own(project):
    (project / "exported" / "notes.txt").write_text("mine")
    for change in ([], ["dpo.train.seed=9"]):
        with pytest.raises(RunError, match=r"did not write: notes\.txt"):
            call(project, *change, dry=False)
    assert (project / "exported" / "notes.txt").read_text() == "mine"


def test_what_is_hidden_in_an_exports_folder_is_left_alone(project):
    (project / "exported" / ".git").mkdir()
    with pytest.raises(RunError, match=r"did not write: \.git"):
        call(project)


def test_two_exports_into_one_folder_are_refused(project):
    chain = project / "chain.yaml"
    chain.write_text(chain.read_text() + "  - {name: again, export: sft, to: exported}\n")
    with pytest.raises(RecipeError, match=r"stage `again`: .*where `model` exports to"):
        call(project)


def test_two_calls_at_once_are_refused(project):
    with ChainState(project / "runs").held(), pytest.raises(RunError, match="another `tunedock pipeline`"):
        call(project, dry=False)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"format": 2}', '{"format": 1, "stages": {"sft": {"x": 1}}, "files": {}}']
)
def test_a_damaged_account_is_told(project, text):
    (project / "runs" / "chain.json").write_text(text)
    with pytest.raises(RunError, match=r"chain\.json"):
        call(project)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("sft.train.learning_rat=1", r"stage `sft`: `train.learning_rat` is not a key"),
        ("sft.data.train=nowhere.jsonl", r"stage `sft`: .*nowhere\.jsonl"),
        ("dpo.adapter=lora+", "stage `dpo`"),
        ("scores.max_sample=1", r"stage `scores`: `eval.max_sample` is not a key"),
        ("scores.train.seed=1", r"stage `scores`: `train.seed` is no key of the `eval` section"),
        ("dpo.adapter.continue_from=stage:sft", r"stage `dpo`"),
    ],
)
def test_all_recipes_are_checked_before_the_first_runs(project, change, told):
    with pytest.raises(RecipeError, match=told):
        call(project, "sft.train.seed=77", change, dry=False)
    assert not (project / "runs" / "sft-2").exists()


def test_a_lora_is_gone_on_with(project):
    base = Run(project / "runs" / "sft").resolved()["recipe"]["model"]["path"]
    more = [f"dpo.model={base}", "dpo.adapter={kind: lora, continue_from: stage:sft}", "scores.limit=1"]
    done = call(project, *more, dry=False, only="dpo")
    assert done[1].action == "run"
    recipe = Run(project / "runs" / "dpo-2").resolved()["recipe"]
    assert (recipe["adapter"]["r"], recipe["adapter"]["continue_from"]) == (4, str(project / "runs" / "sft"))
    assert actions(project, *more)["dpo"] == "skip"


def test_names_that_are_no_stage(project):
    for options in ({"first": "stf"}, {"only": "stf"}):
        with pytest.raises(RecipeError, match="no stage `stf`"):
            call(project, **options)
    with pytest.raises(RecipeError, match="exclude each other"):
        call(project, first="sft", only="sft")


def test_a_stage_that_fails_is_named_and_gone_on_with(project):
    rows = (project / "pairs.jsonl").read_text()
    (project / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": 3}\n' * 8)
    with pytest.raises(DataError, match="stage `dpo`: "):
        call(project, dry=False)
    assert ChainState(project / "runs").records["dpo"].status == "failed"
    assert actions(project)["dpo"] == "resume"
    (project / "pairs.jsonl").write_text(rows)
    assert reason(project, "dpo") == "what changed: the content of pairs.jsonl"


def test_a_run_that_ended_unseen_is_taken_as_it_is(project):
    state = ChainState(project / "runs")
    for name in ("sft", "model"):
        state.records[name].status = "running"
    state.records["sft"].output = {}
    state.save()
    assert {name for name, action in actions(project).items() if action == "resume"} == {"sft", "model"} - {"model"} | {
        "sft"
    }
    call(project, dry=False)
    assert set(actions(project).values()) == {"skip"}
    assert ChainState(project / "runs").records["sft"].count == 1


def test_an_export_that_ended_unseen_is_taken_as_it_is(project):
    state = ChainState(project / "runs")
    state.records["model"].status = "running"
    state.save()
    assert reason(project, "model") == "it is whole already"
    (project / "exported" / "config.json").unlink()
    assert actions(project)["model"] == "run"


class StoppingLauncher(InlineLauncher):
    """Is told to stop before a stage begins, as by Ctrl-C."""

    def start(self, spec):
        raise InterruptedRun("stopped")


def test_a_call_that_is_stopped_says_how_to_go_on(project):
    with pytest.raises(InterruptedRun, match="stage `dpo`") as raised:
        run_chain(project / "chain.yaml", ["dpo.train.seed=6"], folder=project / "runs", launcher=StoppingLauncher())
    assert raised.value.hint == "run the same command again to go on"
    assert actions(project, "dpo.train.seed=6")["dpo"] == "resume"
