"""Runs of the objectives on preferences beside DPO: from data to export, resumed to the last bit, in little memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from families import save_tiny
from tiny_loop import build, losses, weights
from tunedock import pipeline
from tunedock.data.layout import Row
from tunedock.data.sample import Sample, Segment
from tunedock.eval.questions import Question, questions_of
from tunedock.eval.stage import evaluate
from tunedock.events import Emitter
from tunedock.export.stage import export
from tunedock.model.policy import Policy
from tunedock.objective.kto import Kto
from tunedock.recipe.adapters import Full, Lora
from tunedock.recipe.exporting import Order
from tunedock.recipe.schema import Recipe
from tunedock.run.record import Run
from tunedock.run.stop import StopRequest
from tunedock.train.checkpoint import Checkpoints
from tunedock.train.stage import train


def judged(seed: int = 0, longer: int = 1) -> list[Sample]:
    """Wanted completions count up from the same token, whatever the prompt is; unwanted ones repeat one. Most are wanted."""
    draw = np.random.default_rng(seed)
    made = []
    for n in range(22):
        prompt, length = (int(size) for size in longer * draw.integers((3, 3), (9, 12)))
        completion = 50 + np.arange(length) % 40 if n % 4 else np.full(length, 7)
        segments = (
            Segment(draw.integers(1, 90, prompt).astype(np.int32), np.zeros(prompt, np.float32)),
            Segment(completion.astype(np.int32), np.ones(length, np.float32), 0),
        )
        made.append(Sample(f"d:{n}", segments, wanted=n % 4 > 0))
    return made


@pytest.mark.parametrize(
    "adapter",
    [
        pytest.param(Lora(r=4, alpha=8, dropout=0.1), id="lora"),
        pytest.param(Full(), id="full", marks=pytest.mark.long),
    ],
)
def test_resuming_kto_is_bit_identical(tmp_path: Path, adapter: Any) -> None:
    """With the KL of mismatched completions, of which nothing is remembered, in rows that part a step; in the second epoch."""
    settings: dict[str, Any] = {"adapter": adapter, "budget": 40, "samples": judged(), "objective": Kto(0.5)}
    settings |= {"validation": judged(1)[:6], "eval_strategy": "steps", "eval_steps": 3, "learning_rate": 2e-2}
    straight, policy, stream = build(tmp_path / "a", **settings)
    straight.run()
    build(tmp_path / "b", **settings)[0].run()
    for name in ("step-00000008", "step-00000009"):
        shutil.rmtree(tmp_path / "b" / name, ignore_errors=True)
    resumed, again, stream_again = build(tmp_path / "b", **settings)
    resumed.state.restore(Checkpoints(tmp_path / "b", keep=None).load_last(pytest.fail))
    assert resumed.progress.step < 8
    assert resumed.state.reference is not None and resumed.state.reference.remembered <= 28, (
        "mismatched ones are not remembered"
    )
    resumed.run()
    for key in ("loss", "kl", "rewards/margins", "eval_loss", "eval_kl"):
        told, told_again = losses(stream, key), losses(stream_again, key)
        assert told_again and told[-len(told_again) :] == told_again, key
    assert max(losses(stream, "kl")) > 0
    for name, one in weights(policy).items():
        assert torch.equal(one, weights(again)[name]), name


def test_kto_goes_on_where_memory_runs_out_in_its_mismatched_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step is done again in smaller rows, with the same loss."""
    settings: dict[str, Any] = {
        "adapter": Lora(r=4, alpha=8),
        "samples": judged(longer=50),
        "objective": Kto(0.5),
        "steps": 3,
    }
    whole, _, stream = build(tmp_path / "a", budget=4096, **settings)
    whole.run()
    narrow, policy, stream_narrow = build(tmp_path / "b", budget=4096, **settings)
    ask = Policy.logprobs
    failed: list[int] = []

    def short(self: Policy, row: Row) -> Any:
        if self is policy and not torch.is_grad_enabled() and row.slots > 1200 and self.model.training:
            failed.append(row.slots)
            raise torch.OutOfMemoryError("no room for this row")
        return ask(self, row)

    monkeypatch.setattr(Policy, "logprobs", short)
    narrow.run()
    assert failed and losses(stream_narrow) == pytest.approx(losses(stream), rel=1e-4)


PAIRS = [
    {
        "prompt": f"How many hours are in {n} days?",
        "chosen": f"There are {24 * n} hours.",
        "rejected": "I do not know, it is a long time." * (1 + n % 2),
    }
    for n in range(1, 41)
]
LABELLED = [
    {"prompt": row["prompt"], "completion": row["chosen" if n % 2 else "rejected"], "label": n % 2 == 1}
    for n, row in enumerate(PAIRS)
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preferences")
    save_tiny("qwen3", folder / "base")
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    (folder / "labelled.jsonl").write_text("\n".join(map(json.dumps, LABELLED)))
    (folder / "recipe.yaml").write_text(
        "model: ./base\nobjective: kto\ndata: {train: pairs.jsonl, max_length: 128, cache_dir: ./cache}\n"
        "train: {num_train_epochs: 2, batch_size: 8, learning_rate: 5.0e-3, bf16: false, token_budget: 256, report_to: none}\n"
        "eval: {max_new_tokens: 4, max_samples: 3}\n"
    )
    return folder


def run_of(place: Path, name: str, *overrides: str) -> tuple[Run, Recipe]:
    given = [*overrides, f"train.output_dir={place / name}"]
    resolved = pipeline.resolve_recipe([place / "recipe.yaml"], given)
    run = pipeline.create_run(resolved)
    train(run, resolved.recipe, Emitter.to_file(run.events), resume=False, stop=StopRequest())
    return run, resolved.recipe


def metrics(run: Run, key: str) -> list[dict[str, float]]:
    events = [json.loads(line) for line in run.events.read_text().splitlines()]
    return [e["values"] for e in events if e["kind"] == "metrics" and key in e["values"]]


@pytest.mark.parametrize(
    ("name", "settings", "unit", "asks_base"),
    [
        pytest.param("orpo", ["objective=orpo"], "pairs", False, marks=pytest.mark.long),
        pytest.param("simpo", ["objective={kind: simpo, sft_weight: 0.1}"], "pairs", False, marks=pytest.mark.long),
        ("kto", ["data.train=labelled.jsonl", "data.split={validation: 0.25, test: 0.0}"], "completions", True),
        pytest.param(
            "kto-full", ["adapter=full", "train.learning_rate=1e-3"], "completions", True, marks=pytest.mark.long
        ),
    ],
)
def test_a_run_from_data_to_export(
    place: Path, name: str, settings: list[str], unit: str, asks_base: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    run, recipe = run_of(place, name, *settings)
    steps = metrics(run, "loss")
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert steps[-1]["rewards/margins"] > steps[0]["rewards/margins"]
    evaluated = metrics(run, "eval_loss")[-1]
    assert evaluated["eval_rewards/margins"] > 0 and evaluated[f"eval_{unit}"] > 0
    notes = [e["message"] for line in run.events.read_text().splitlines() if (e := json.loads(line))["kind"] == "note"]
    assert any("reference policy" in note for note in notes) == asks_base
    found = evaluate(run, recipe, Emitter(None), side="validation", options=recipe.eval)
    assert found["tuned"]["loss"] == pytest.approx(evaluated["eval_loss"], rel=1e-4)
    assert found["tuned"][unit] == evaluated[f"eval_{unit}"]
    assert ("loss" in found["base"]) != asks_base, "a base that is the reference prefers nothing to itself"
    assert found["answers"] and all(answer["reference"].startswith("There are") for answer in found["answers"])
    made = export(run, recipe, Emitter(None), order=Order(to=str(place / f"export-{name}"), format="hf"))
    assert made["checks"]["changed_tensors"] > 0


def test_questions_are_asked_once_and_of_wanted_answers(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a pair read as verdicts one question, of an unwanted answer none."""
    from tunedock.data import prepare
    from tunedock.model.session import find_base

    monkeypatch.chdir(place)
    for file, rows in (("pairs.jsonl", 40), ("labelled.jsonl", 20)):
        recipe = pipeline.resolve_recipe([place / "recipe.yaml"], [f"data.train={file}"]).recipe
        prepared = prepare.prepare(recipe, find_base(recipe, weights=False).chat, Emitter(None))
        asked: Sequence[Question] = []
        for side in ("train", "validation", "test"):
            asked = [*asked, *questions_of(prepared.side(side), None)]
        assert len({question.row_id for question in asked}) == len(asked) == rows
        assert all(question.reference.startswith("There are") for question in asked)
