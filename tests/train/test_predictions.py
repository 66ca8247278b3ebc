"""`train.predict_with_generate`: the figures are those of `tunedock eval`, and training does not notice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from families import save_tiny
from tunedock import pipeline
from tunedock.errors import DataError, InterruptedRun
from tunedock.eval.stage import evaluate
from tunedock.events import Emitter
from tunedock.recipe.schema import Recipe
from tunedock.run.record import Run, read_json
from tunedock.run.stop import StopRequest
from tunedock.train.metric_names import greater_is_better
from tunedock.train.stage import train

FIGURES = ("exact_match", "rouge1", "rouge2", "rougeL", "bleu")
ANSWER = "There are hours in days"

ROWS: dict[str, list[dict[str, Any]]] = {
    "sft": [
        {"messages": [{"role": "user", "content": f"{n} days?"}, {"role": "assistant", "content": ANSWER}]}
        for n in range(1, 25)
    ],
    "dpo": [{"prompt": f"{n} days?", "chosen": ANSWER, "rejected": "No idea."} for n in range(1, 25)],
    "kto": [
        {"prompt": f"{n} days?", "completion": ANSWER if n % 3 else "No idea.", "label": n % 3 > 0}
        for n in range(1, 25)
    ],
    "unwanted": [{"prompt": f"{n} days?", "completion": "No idea.", "label": False} for n in range(1, 5)],
}


def run_of(
    folder: Path, name: str, *settings: str, objective: str = "sft", trains: bool = True
) -> tuple[Run, dict[str, Any]]:
    if not (folder / "base").exists():
        save_tiny("qwen3", folder / "base")
    for kind, rows in ROWS.items():
        (folder / f"{kind}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "recipe.yaml").write_text(
        f"model: ./base\nobjective: {objective}\nadapter: full\noffline: true\n"
        f"data: {{train: {objective}.jsonl, max_length: 96, cache_dir: ./cache, split: {{validation: 0.5, test: 0.0}}}}\n"
        "train: {max_steps: 8, batch_size: 8, learning_rate: 5e-3, neftune_noise_alpha: 5, bf16: false, token_budget: 256,\n"
        "  save_steps: 4, eval_strategy: steps, eval_steps: 4, report_to: none, predict_with_generate: true}\n"
        "eval: {max_new_tokens: 10, max_samples: 7, batch_size: 4, compare_base: false}\n"
    )
    resolved = pipeline.resolve_recipe(
        [folder / "recipe.yaml"], [f"train.output_dir={folder / f'{objective}-{name}'}", *settings]
    )
    run = pipeline.create_run(resolved)
    return run, trained(run) if trains else {}


def trained(run: Run, *, resume: bool = False, stop: StopRequest | None = None) -> dict[str, Any]:
    return train(run, recipe_of(run), Emitter.to_file(run.events), resume=resume, stop=stop or StopRequest())


def told(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.events.read_text().splitlines()]


def evaluations(run: Run) -> list[dict[str, float]]:
    return [e["values"] for e in told(run) if e["kind"] == "metrics" and "eval_loss" in e["values"]]


def recipe_of(run: Run) -> Recipe:
    return Recipe.model_validate(run.resolved()["recipe"])


def losses(run: Run) -> list[float]:
    return [
        v for e in told(run) if e["kind"] == "metrics" for k, v in e["values"].items() if k in ("loss", "eval_loss")
    ]


def assert_eval_says_the_same(run: Run, values: dict[str, float]) -> list[dict[str, Any]]:
    """`tunedock eval` of the run's weights: what it says of the answers, and the answers."""
    recipe = recipe_of(run)
    found = evaluate(run, recipe, Emitter(None), side="validation", options=recipe.eval)
    assert {name: found["tuned"][name] for name in FIGURES} == {name: values[f"eval_{name}"] for name in FIGURES}
    answers: list[dict[str, Any]] = found["answers"]
    return answers


def test_training_does_not_notice(tmp_path: Path) -> None:
    """Steps that draw noise, beside answers that are drawn."""
    plain, _ = run_of(tmp_path, "plain", "train.predict_with_generate=false")
    run, _ = run_of(tmp_path, "answered", "eval.temperature=0.5")
    assert losses(run) == losses(plain) and len(losses(run)) == 10
    wanted, got = (load_file(one.model / "model.safetensors") for one in (plain, run))
    assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())
    assert not any(f"eval_{name}" in values for name in FIGURES for values in evaluations(plain))
    assert_eval_says_the_same(run, evaluations(run)[-1])
    assert evaluations(run)[-1]["eval_rouge1"] > 0
    tasks = [(e["done"], e["total"]) for e in told(run) if e.get("task") == "validation answers"]
    assert tasks == [(0, 7), (4, 7), (7, 7)] * 2


def test_the_best_is_told_by_a_figure_of_the_answers(tmp_path: Path) -> None:
    run, result = run_of(
        tmp_path,
        "best",
        "train.metric_for_best_model=eval_rouge1",
        "train.load_best_model_at_end=true",
        "train.learning_rate=2e-2",
        "train.eval_steps=2",
        "train.max_steps=12",
    )
    measured = evaluations(run)
    best = max(measured, key=lambda values: values["eval_rouge1"])
    index = read_json(run.checkpoints / "index.json")
    assert index["best_metric"] == best["eval_rouge1"] == result["best_eval_rouge1"] > 0
    assert index["best"] == f"step-{2 * (measured.index(best) + 1):08d}" != index["last"]
    assert result["eval_loss"] == best["eval_loss"]
    assert_eval_says_the_same(run, best)


def test_without_an_answer_that_is_wanted_there_is_nothing_to_compare_with(tmp_path: Path) -> None:
    own = (f"data.validation={tmp_path}/unwanted.jsonl", "data.split={validation: 0.0, test: 0.0}")
    with pytest.raises(DataError, match="no validation row has a question") as caught:
        run_of(tmp_path, "unwanted", *own, objective="kto")
    assert caught.value.where == "train.predict_with_generate"


@pytest.mark.long
def test_stopped_while_answers_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The evaluation is done again when the run goes on, as if it had not been begun."""
    straight, _ = run_of(tmp_path, "straight")
    cut, _ = run_of(tmp_path, "cut", trains=False)
    stop = StopRequest()
    monkeypatch.setattr(
        stop, "asked", lambda: any(e.get("task") == "validation answers" and e["done"] for e in told(cut))
    )
    with pytest.raises(InterruptedRun, match="stopped after step 4; a checkpoint is saved"):
        trained(cut, stop=stop)
    assert not evaluations(cut)
    trained(cut, resume=True)
    figures = [[{name: one[f"eval_{name}"] for name in FIGURES} for one in evaluations(run)] for run in (cut, straight)]
    assert figures[0] == figures[1] and losses(cut) == losses(straight)


@pytest.mark.long
@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_answers_that_are_wanted_are_compared_with(tmp_path: Path, objective: str) -> None:
    run, _ = run_of(tmp_path, "answered", objective=objective)
    answers = assert_eval_says_the_same(run, evaluations(run)[-1])
    assert len(answers) == 7 and {answer["reference"] for answer in answers} == {ANSWER}


def test_of_losses_less_is_better() -> None:
    assert not greater_is_better("eval_loss")
    assert all(greater_is_better(f"eval_{name}") for name in FIGURES)
