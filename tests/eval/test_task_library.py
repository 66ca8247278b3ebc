"""Tasks by name: what is loaded, what is refused, and how what cannot be had is said."""

from __future__ import annotations

import importlib.util
import io
import json
import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

import datasets
import huggingface_hub
from lm_eval.tasks import TaskManager

from own_tasks import CHOICE, TASKS, write_tasks
from tunedock.errors import DataError, DependencyError, RecipeError
from tunedock.eval import task_library
from tunedock.eval.task_library import FEWSHOT_SEED, LoadedTask, load_tasks
from tunedock.events import Emitter
from tunedock.recipe.schema import Eval, Recipe

HUB_TASK = """\
task: far
dataset_path: nobody-here/no-such-data
output_type: generate_until
test_split: test
doc_to_text: "{{q}}"
doc_to_target: "{{a}}"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tasks(tmp_path / "tasks")


def load(
    folder: Path, *names: str, offline: bool = True, emit: Emitter | None = None, **options: Any
) -> list[LoadedTask]:
    recipe = Recipe.model_validate({"model": "some/model", "data": {"train": ["x.jsonl"]}, "offline": offline})
    return load_tasks(recipe, Eval(tasks=list(names), tasks_path=str(folder), **options), emit or Emitter(None))


def test_own_tasks_load_without_lm_evals_and_from_anywhere(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Their data files start from their folder."""
    monkeypatch.chdir(tmp_path)
    asked: list[bool] = []
    real = TaskManager.__init__
    monkeypatch.setattr(
        TaskManager, "__init__", lambda self, **more: asked.append(more["include_defaults"]) or real(self, **more)
    )
    monkeypatch.setattr(task_library, "ask", lambda _: pytest.fail("the hub was asked"))
    loaded = load(folder, *TASKS, TASKS[0], offline=False)
    assert [task.name for task in loaded] == list(TASKS)
    assert asked == [False]
    assert Path.cwd() == tmp_path


@pytest.mark.parametrize(("given", "own", "used"), [(None, None, 0), (3, None, 3), (None, 1, 1), (3, 1, 3), (3, 0, 0)])
def test_examples_shown_are_those_lm_eval_would_show(
    folder: Path, given: int | None, own: int | None, used: int
) -> None:
    if own is not None:
        (folder / "choice.yaml").write_text(CHOICE + f"num_fewshot: {own}\n")
    (loaded,) = load(folder, "own_choice", num_fewshot=given)
    task = loaded.content["tasks"]["own_choice"]
    assert task.get_config("num_fewshot") == used
    assert task.sampler.rnd.getstate() == random.Random(FEWSHOT_SEED).getstate()


def test_a_group_of_own_tasks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "both.yaml").write_text("group: both\ntask: [own_choice, own_sums]\n")
    monkeypatch.setattr(task_library, "_manager", _small_manager)  # lm-eval's 14,000 files take seconds
    (loaded,) = load(folder, "both")
    assert set(loaded.content["tasks"]) == {"own_choice", "own_sums"} and set(loaded.content["groups"]) == {"both"}


def _small_manager(names: Any, options: Eval, own: Any) -> TaskManager:
    return TaskManager(include_path=options.tasks_path, include_defaults=False)


def test_an_unknown_name_is_told_its_neighbours(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_library, "_manager", _small_manager)
    with pytest.raises(RecipeError, match="there is no task `own_chioce`") as caught:
        load(folder, "own_chioce")
    assert "own_choice" in (caught.value.hint or "")
    for name in ("", str(folder / "choice.yaml"), "own_*"):  # a path would be loaded without being looked through
        with pytest.raises(RecipeError, match="there is no task"):
            load(folder, name)


def test_data_that_are_not_there(folder: Path) -> None:
    (folder / "sums.jsonl").unlink()
    with pytest.raises(DataError, match=r"sums\.jsonl") as caught:
        load(folder, "own_sums")
    assert caught.value.where == "eval.tasks: own_sums" and "data_files" in (caught.value.hint or "")


@pytest.mark.parametrize("offline", [False, True])
def test_without_a_network_the_way_out_is_said_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, offline: bool
) -> None:
    """Offline by the recipe, or because nobody answers; the libraries are as they were afterwards."""
    (folder / "far.yaml").write_text(HUB_TASK)
    monkeypatch.setattr(task_library, "_answers", lambda hub: False)
    told = io.StringIO()
    with pytest.raises(DataError, match="its data cannot be had") as caught:
        load(folder, "far", offline=offline, emit=Emitter(told))
    assert caught.value.where == "eval.tasks: far" and "HF_HOME" in (caught.value.hint or "")
    warned = [json.loads(line) for line in told.getvalue().splitlines() if "warning" in line]
    assert len(warned) == (0 if offline else 1)
    assert not datasets.config.HF_HUB_OFFLINE and not huggingface_hub.constants.HF_HUB_OFFLINE


def test_a_hub_nobody_answers_for() -> None:
    assert not task_library._answers("http://127.0.0.1:9")


def test_templates_run_in_a_sandbox(folder: Path, tmp_path: Path) -> None:
    trap = f"{{{{ cycler.__init__.__globals__.os.system('touch {tmp_path / 'run'}') }}}}"
    (folder / "choice.yaml").write_text(CHOICE.replace("{{question}}", trap))
    with pytest.raises(DataError, match="unsafe"):
        load(folder, "own_choice")
    assert not (tmp_path / "run").exists()


def test_a_column_that_is_not_there(folder: Path) -> None:
    (folder / "choice.yaml").write_text(CHOICE.replace("{{question}}", "{{nothing}}"))
    with pytest.raises(DataError, match="'nothing' is undefined") as caught:
        load(folder, "own_choice")
    assert caught.value.where == "eval.tasks: own_choice"


def test_code_runs_only_where_it_is_allowed(folder: Path) -> None:
    (folder / "shown.py").write_text("def text(row):\n    return row['question'] + ' by code'\n")
    (folder / "choice.yaml").write_text(CHOICE.replace('"{{question}}\\nA:"', "!function shown.text"))
    with pytest.raises(RecipeError, match="runs Python code"):
        load(folder, "own_choice")
    (loaded,) = load(folder, "own_choice", tasks_run_code=True)
    task = loaded.content["tasks"]["own_choice"]
    assert task.doc_to_text(next(iter(task.eval_docs))).endswith("by code")


def test_metrics_are_not_fetched_behind_the_back_of_the_check(folder: Path) -> None:
    """A task whose own code asks for one, as several of lm-eval's do."""
    import evaluate

    before = evaluate.load
    with task_library.no_fetched_metrics(Eval()) as refused, pytest.raises(RuntimeError, match="not fetched"):
        evaluate.load("squad_v2")
    assert refused == ["squad_v2"] and evaluate.load is before
    with task_library.no_fetched_metrics(Eval(tasks_run_code=True)):
        assert evaluate.load is before


def test_a_task_that_runs_what_the_model_writes_is_refused(folder: Path) -> None:
    (folder / "choice.yaml").write_text(CHOICE + "unsafe_code: true\n")
    with pytest.raises(RecipeError, match="code the model writes"):
        load(folder, "own_choice")


def test_the_install_line_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "lm_eval" else real(name, *more)
    )
    with pytest.raises(DependencyError) as caught:
        load(folder, "own_choice")
    assert caught.value.hint == "pip install 'tunedock[lm-eval]'"
