"""`tunedock eval --task`, from the command line to the files: adapters, whole weights, a quantised base."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from families import save_tiny
from inline_worker import InlineLauncher
from own_tasks import TASKS, rows, write_tasks
from tunedock.cli.app import main
from tunedock.eval.task_page import page
from tunedock.recipe.schema import Eval
from tunedock.run.record import Run

RECIPE = """\
model: ./base
offline: true
data: {train: ./rows.jsonl, max_length: 128, cache_dir: ./cache}
train: {max_steps: 12, batch_size: 8, learning_rate: 2.0e-2, bf16: false, token_budget: 512, report_to: none}
eval: {max_samples: 2, max_new_tokens: 4, tasks_path: ./tasks}
"""

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks-run")
    save_tiny("qwen3", folder / "base")
    write_tasks(folder / "tasks")
    chats = [
        {
            "messages": [
                {"role": "user", "content": row["question"]},
                {"role": "assistant", "content": row["answer"]},
            ]
        }
        for row in rows() * 2
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (folder / "r.yaml").write_text(RECIPE)
    return folder


@pytest.fixture
def tunedock(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    monkeypatch.chdir(place)
    monkeypatch.setattr("tunedock.launch.places.LocalLauncher", InlineLauncher)

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        written = capsys.readouterr()
        return int(ended.value.code or 0), written.out, written.err

    return run


def trained(tunedock: Command, name: str, *settings: str) -> Path:
    path = Path("runs") / name
    if not path.exists():
        code, _, err = tunedock("train", "r.yaml", f"train.output_dir=runs/{name}", *settings)
        assert code == 0, err
    return path.absolute()


def figures(path: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    told = json.loads((path / "eval" / "tasks.json").read_text())
    return {(task["task"], line["metric"], line["filter"]): line for task in told["tasks"] for line in task["metrics"]}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("lora", ["adapter.r=4"]),
        pytest.param("full", ["adapter=full"], marks=pytest.mark.long),
        pytest.param("nf4", ["adapter.r=4", "quantize=nf4"], marks=pytest.mark.long),
    ],
)
def test_base_beside_tuned(tunedock: Command, name: str, settings: list[str]) -> None:
    path = trained(tunedock, name, *settings)
    names = [word for task in TASKS for word in ("--task", task)]
    code, out, err = tunedock("eval", name, *names, "apply_chat_template=true", "num_fewshot=1")
    assert code == 0, err
    found = figures(path)
    assert {task for task, _, _ in found} == set(TASKS)
    bits = found["own_texts", "bits_per_byte", "none"]
    assert bits["tuned"] != bits["base"] and bits["higher_is_better"] is False
    assert found["own_choice", "acc", "none"]["base_stderr"] > 0
    assert "own_choice" in out and "exact_match (number)" in out and "±" in out and "loss" not in out
    samples = [json.loads(line) for line in (path / "eval" / "tasks-samples.jsonl").read_text().splitlines()]
    assert {sample["model"] for sample in samples} == {"base", "tuned"}
    assert len(samples) == 2 * (12 + 2 * 12 + 5)
    choice = next(sample for sample in samples if sample["task"] == "own_choice")
    assert "<|im_start|>assistant" in choice["prompt"] and len(choice["choices"]) == len(choice["resps"]) == 4
    told = json.loads((path / "eval" / "tasks.json").read_text())
    assert told["lm_eval"] and told["apply_chat_template"] and told["limit"] is None
    assert [(task["version"], task["num_fewshot"], task["samples"]) for task in told["tasks"]] == [
        (1.0, 1, 12), (2, 1, 12), (2.0, 1, 5),
    ]  # fmt: skip
    assert not (path / "eval" / "metrics.json").exists()


def test_tasks_of_the_recipe_stand_beside_the_held_out_rows(tunedock: Command) -> None:
    path = trained(tunedock, "lora", "adapter.r=4")
    code, out, err = tunedock("eval", "lora", "tasks=[own_sums]", "limit=3", "compare_base=false", "--json")
    assert code == 0, err
    value = json.loads(out)
    assert value["tuned"]["loss"] > 0 and value["base"] is None
    (task,) = value["tasks"]["tasks"]
    assert (task["samples"], task["documents"]) == (3, 12)
    assert "base" not in task["metrics"][0]
    assert (path / "eval" / "metrics.json").exists() and (path / "eval" / "answers.html").exists()
    shown = (path / "eval" / "tasks.html").read_text()
    assert "3 of 12" in shown and "at most 3 documents" in shown and '<th scope="col">Base</th>' not in shown
    code, out, err = tunedock("eval", "lora", "tasks=own_sums", "limit=3", "compare_base=false")
    assert code == 0, err
    assert out.index("own_sums") < out.index("perplexity")


@pytest.fixture
def own_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without lm-eval's own 14,000 files, which take seconds to read."""
    from lm_eval.tasks import TaskManager

    from tunedock.eval import task_library

    def manager(names: Any, options: Eval, own: Any) -> TaskManager:
        return TaskManager(include_path=options.tasks_path, include_defaults=False)

    monkeypatch.setattr(task_library, "_manager", manager)


def test_a_group_has_a_figure_of_its_own(tunedock: Command, place: Path, own_only: None) -> None:
    path = trained(tunedock, "lora", "adapter.r=4")
    again = (place / "tasks" / "choice.yaml").read_text().replace("own_choice", "own_choice_again")
    (place / "more").mkdir()
    write_tasks(place / "more")
    (place / "more" / "again.yaml").write_text(again)
    (place / "more" / "both.yaml").write_text(
        "group: both\ntask: [own_choice, own_choice_again]\nmetadata: {version: 3}\n"
        "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    code, _, err = tunedock("eval", "lora", "--task", "both", "tasks_path=./more")
    assert code == 0, err
    tasks = {task["task"]: task for task in json.loads((path / "eval" / "tasks.json").read_text())["tasks"]}
    assert [name for name, task in tasks.items() if task["group"]] == ["both"]
    assert (tasks["both"]["version"], tasks["both"]["samples"]) == ("3", 24)
    figures = [tasks[name]["metrics"][0] for name in ("own_choice", "own_choice_again", "both")]
    assert len({line["tuned"] for line in figures}) == len({line["base"] for line in figures}) == 1


@pytest.mark.parametrize(
    ("arguments", "exit_code", "said"),
    [
        (["--task", "own_sums", "tasks_path=null"], 2, "there is no task `own_sums`"),
        (["--task", "own_sums", "tasks_path=./nowhere"], 2, "nowhere"),
        (["--task", "own_sums", "limit=0"], 2, "`eval.limit: 0` should be a number above 0"),
        (["--task", "own_sums", "num_fewshot=-1"], 2, "eval.num_fewshot"),
        (["--task", "own_sums", "max_samples=5"], 2, "hint: `limit=5"),
        (["--task", "own_sums", "eval.temperature=1.0"], 2, "is about the held-out rows"),
        (["--task", "own_sums", "--split", "validation"], 2, "--split: a task has its own documents"),
        (["--task", "own_sums", "num_fewshot=500"], 3, "eval.tasks: own_sums: the task fails"),
    ],
)
def test_what_cannot_be(tunedock: Command, own_only: None, arguments: list[str], exit_code: int, said: str) -> None:
    path = trained(tunedock, "bad", "adapter.r=4")
    code, out, err = tunedock("eval", "bad", *arguments)
    assert code == exit_code, err
    assert said in err and "Traceback" not in err + out
    assert not (path / "eval").exists()
    assert Run(path).state().status == "finished"


def test_names_on_the_page_are_text() -> None:
    line = {"metric": "<b>acc</b>", "filter": "none", "higher_is_better": None, "tuned": "<i>", "tuned_stderr": None}
    task = {
        "task": "<script>",
        "version": "<u>",
        "num_fewshot": None,
        "samples": 1,
        "documents": None,
        "metrics": [line],
    }
    shown = page(
        {"run": "<r>", "lm_eval": "0", "limit": None, "apply_chat_template": False, "compared": False, "tasks": [task]}
    )
    assert "&lt;script&gt;" in shown and "&lt;b&gt;" in shown and "&lt;i&gt;" in shown
    assert "<script" not in shown and "<b>" not in shown
