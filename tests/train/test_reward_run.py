"""A reward model as people make it: it learns, resumes to the last bit, and plain transformers and PEFT load what it writes."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from families import save_tiny
from tunedock import pipeline
from tunedock.data import prepare as preparing
from tunedock.data.conversation import Conversation, Message
from tunedock.errors import ModelError, RecipeError, RunError
from tunedock.eval import inspect_data
from tunedock.eval.stage import evaluate
from tunedock.eval.talk import talk
from tunedock.events import Emitter
from tunedock.export.stage import export
from tunedock.model import adapter as adapters
from tunedock.model.scorer import load_scorer
from tunedock.model.session import find_base, trainable_policy
from tunedock.recipe.exporting import Order
from tunedock.recipe.schema import Recipe
from tunedock.run.record import Run
from tunedock.run.stop import StopRequest
from tunedock.train.checkpoint import Checkpoints
from tunedock.train.stage import train

ROWS = [
    {
        "prompt": f"How many hours are in {n} days?",
        "chosen": f"There are {24 * n} hours.",
        "rejected": "I do not know, it is a long time." * (1 + n % 2),
        **({"margin": 0.1 * (n % 3)} if n % 4 else {}),
    }
    for n in range(1, 41)
]
RECIPE = """
model: ./base
objective: reward
adapter: {kind: lora, r: 4}
data: {train: rows.jsonl, split: {train: 0.8, validation: 0.2, test: 0.0}, max_length: 128, cache_dir: ./cache}
train: {num_train_epochs: 3, batch_size: 4, learning_rate: 5.0e-3, bf16: false, save_steps: 8, report_to: none}
"""


def workplace(folder: Path, family: str = "qwen3") -> Path:
    if not (folder / "base").exists():
        save_tiny(family, folder / "base")
        (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
        (folder / "recipe.yaml").write_text(RECIPE)
    return folder / "recipe.yaml"


def run_of(folder: Path, name: str, *overrides: str, family: str = "qwen3") -> tuple[Run, Recipe]:
    resolved = pipeline.resolve_recipe([workplace(folder, family)], [*overrides, f"train.output_dir={folder / name}"])
    run = pipeline.create_run(resolved)
    train(run, resolved.recipe, Emitter.to_file(run.events), resume=False, stop=StopRequest())
    return run, resolved.recipe


def events(run: Run, kind: str) -> list[dict[str, Any]]:
    return [e for line in run.events.read_text().splitlines() if (e := json.loads(line))["kind"] == kind]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reward")


@pytest.fixture(scope="module")
def made(place: Path) -> dict[str, tuple[Run, Recipe]]:
    return {name: run_of(place, name, f"adapter={name}") for name in ("lora", "full")}


def plain(folder: Path, *, adapter: bool = False) -> tuple[Any, Any]:
    """(model, tokenizer) as anybody loads them."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if adapter:
        model = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1)
        model.config.pad_token_id = tokenizer.pad_token_id
    else:
        model = AutoModelForSequenceClassification.from_pretrained(folder)
    return model.eval(), tokenizer


@torch.no_grad()
def scores_by(model: Any, tokenizer: Any, *, together: bool) -> list[float]:
    """Scores of the rows' answers by plain transformers, from messages; one by one, or padded into one batch."""
    talks = [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]
        for row in ROWS[:4]
        for side in ("chosen", "rejected")
    ]
    found: list[float] = []
    for batch in [talks] if together else [[one] for one in talks]:
        inputs = tokenizer.apply_chat_template(
            batch, return_tensors="pt", return_dict=True, padding=True, tokenizer_kwargs={"padding_side": "right"}
        )
        found += model(**inputs).logits[:, 0].tolist()
    return found


def asked() -> list[Conversation]:
    return [
        Conversation((Message("user", str(row["prompt"])), Message("assistant", str(row[side]))))
        for row in ROWS[:4]
        for side in ("chosen", "rejected")
    ]


@pytest.mark.parametrize("name", ["lora", "full"])
def test_a_run_from_data_to_export(place: Path, made: dict[str, tuple[Run, Recipe]], name: str) -> None:
    run, recipe = made[name]
    steps = [e["values"] for e in events(run, "metrics") if "loss" in e["values"]]
    assert steps[-1]["loss"] < 0.4 < steps[0]["loss"] and steps[-1]["accuracy"] > 0.9 and steps[-1]["margin"] > 0
    assert all(step["min_reward"] <= step["mean_reward"] <= step["max_reward"] for step in steps)
    evaluated = [e["values"] for e in events(run, "metrics") if "eval_loss" in e["values"]]
    assert evaluated[-1]["eval_accuracy"] > 0.9 and evaluated[-1]["eval_pairs"] > 0
    assert run.state().objective == "reward"

    found = evaluate(run, recipe, Emitter(None), side="validation", options=recipe.eval)
    assert "base" not in found and found["tuned"]["accuracy"] > 0.9
    for figure in ("loss", "margin", "min_reward", "max_reward", "pairs"):
        assert found["tuned"][figure] == pytest.approx(evaluated[-1][f"eval_{figure}"], rel=1e-4)
    gaps = [pair["chosen"] - pair["rejected"] for pair in found["scores"]]
    assert len(gaps) == found["samples"] == found["tuned"]["pairs"] and gaps == sorted(gaps)
    assert json.loads((run.path / "eval" / "metrics.json").read_text())["tuned"] == found["tuned"]

    wanted = load_scorer(run.path).scores(asked())
    to = place / f"export-{name}"
    checks = export(run, recipe, Emitter(None), order=Order(to=str(to), format="hf"))["checks"]
    assert checks["changed_tensors"] > 0 and checks["same_order"] == 1.0 and "same_top_token" not in checks
    config = json.loads((to / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForSequenceClassification"] and len(config["id2label"]) == 1
    assert "AutoModelForSequenceClassification" in (to / "README.md").read_text()
    for together in (False, True):
        assert scores_by(*plain(to), together=together) == pytest.approx(wanted, rel=1e-4, abs=1e-4)
    assert load_scorer(to).scores(asked()) == pytest.approx(
        wanted, abs=0.05
    )  # in 16 bits, where the processor has them


def test_the_adapter_is_one_that_peft_loads(place: Path, made: dict[str, tuple[Run, Recipe]]) -> None:
    run, recipe = made["lora"]
    config = json.loads((run.model / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and "score" in config["modules_to_save"]
    wanted = load_scorer(run.path).scores(asked())
    to = place / "adapter"
    export(run, recipe, Emitter(None), order=Order(to=str(to), format="adapter"))
    for folder in (run.model, to):
        for together in (False, True):
            got = scores_by(*plain(folder, adapter=True), together=together)
            assert got == pytest.approx(wanted, rel=1e-4, abs=1e-4)
        assert load_scorer(folder).scores(asked()) == pytest.approx(wanted, abs=0.05)
    readme = (to / "README.md").read_text()
    assert "AutoPeftModelForSequenceClassification" in readme and "num_labels=1" in readme


def test_padding_that_ends_answers_is_replaced(tmp_path: Path) -> None:
    """This family's padding is its end of an answer: transformers would read every score one token early."""
    run, recipe = run_of(tmp_path, "run", "adapter=full", family="mistral")
    wanted = load_scorer(run.path).scores(asked())
    export(run, recipe, Emitter(None), order=Order(to=str(tmp_path / "out"), format="hf"))
    model, tokenizer = plain(tmp_path / "out")
    assert tokenizer.pad_token != tokenizer.eos_token and model.config.pad_token_id == tokenizer.pad_token_id
    for together in (False, True):
        assert scores_by(model, tokenizer, together=together) == pytest.approx(wanted, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(["adapter=lora", "adapter.dropout=0.1"], id="lora"),
        pytest.param(["adapter=full"], id="full", marks=pytest.mark.long),
    ],
)
def test_resuming_is_bit_identical(place: Path, settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """From the middle; rows part some pairs, for the budget is smaller than most."""
    name = f"straight-{settings[0][8:]}"
    run, recipe = run_of(
        place, name, *settings, "train.token_budget=64", "train.num_train_epochs=1", "train.save_steps=4"
    )
    whole = [e for e in events(run, "metrics") if "loss" in e["values"]]
    weights = (run.model / ("model.safetensors" if "full" in name else "adapter_model.safetensors")).read_bytes()
    last = Checkpoints(run.checkpoints, keep=None).index().last
    assert last is not None
    shutil.rmtree(run.checkpoints / last)
    shutil.rmtree(run.model)
    run.events.unlink()
    train(run, recipe, Emitter.to_file(run.events), resume=True, stop=StopRequest())
    again = [e for e in events(run, "metrics") if "loss" in e["values"]]
    assert 0 < len(again) < len(whole)
    timeless = ("loss", "accuracy", "margin", "mean_reward", "min_reward", "max_reward", "grad_norm")
    for one, other in zip(whole[-len(again) :], again, strict=True):
        assert {key: one["values"][key] for key in timeless} == {key: other["values"][key] for key in timeless}
    file = run.model / ("model.safetensors" if "full" in name else "adapter_model.safetensors")
    assert file.read_bytes() == weights


@pytest.mark.parametrize("kind", ["fp8", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("nf4", "int8"))])
def test_on_a_base_of_few_bits(place: Path, kind: str) -> None:
    run, recipe = run_of(place, kind, f"quantize={kind}")
    steps = [e["values"] for e in events(run, "metrics") if "loss" in e["values"]]
    assert steps[-1]["loss"] < 0.5 < steps[0]["loss"]
    assert any("14 linear layers" in e["message"] for e in events(run, "note")), "the score layer stays whole"
    found = evaluate(run, recipe, Emitter(None), side="validation", options=recipe.eval)
    assert found["tuned"]["accuracy"] > 0.8


def test_it_goes_on_from_a_reward_model(place: Path, made: dict[str, tuple[Run, Recipe]], tmp_path: Path) -> None:
    run, recipe = made["full"]
    export(run, recipe, Emitter(None), order=Order(to=str(tmp_path / "first"), format="hf"))
    resolved = pipeline.resolve_recipe([workplace(place)], [f"model={tmp_path / 'first'}"])
    policy = trainable_policy(find_base(resolved.recipe))
    trained = adapters.trainable_state(policy.model)
    (name,) = (name for name in trained if "score" in name)
    first, _ = plain(tmp_path / "first")
    assert torch.equal(trained[name], first.score.weight.detach())


def test_the_score_layer_is_drawn_by_the_seed(place: Path) -> None:
    resolved = pipeline.resolve_recipe([workplace(place)], ["adapter=full"])
    base = find_base(resolved.recipe)
    draws = [trainable_policy(base).model.score.weight.detach().clone() for _ in range(2)]
    assert torch.equal(*draws) and 0.01 < float(draws[0].std()) < 0.04


def test_chat_and_tasks_are_refused(made: dict[str, tuple[Run, Recipe]]) -> None:
    run, recipe = made["lora"]
    with pytest.raises(RunError, match="scores answers and writes none"):
        talk(run, recipe, io.StringIO("{}\n"), Emitter(None), StopRequest(), which="tuned")
    options = recipe.eval.model_copy(update={"tasks": ["hellaswag"]})
    with pytest.raises(RecipeError, match="gives scores and no text"):
        evaluate(run, recipe, Emitter(None), side="validation", options=options)


def test_margins_travel_with_their_pairs(place: Path) -> None:
    resolved = pipeline.resolve_recipe([workplace(place)], [])
    prepared = preparing.prepare(resolved.recipe, find_base(resolved.recipe).chat, Emitter(None))
    store = prepared.side("train")
    for i in range(len(store)):
        stored = store.stored(i)
        assert store[i].margin == stored.sample.margin == pytest.approx(stored.example.margin or 0.0)  # type: ignore[union-attr]
        assert [float(segment.weights_T.sum()) for segment in store[i].segments] == [0.0, 1.0, 1.0]
        assert [float(segment.weights_T[-1]) for segment in store[i].segments[1:]] == [1.0, 1.0]
    assert {round(store[i].margin, 1) for i in range(len(store))} == {0.0, 0.1, 0.2}


def test_data_show_shows_where_scores_are_read(place: Path) -> None:
    resolved = pipeline.resolve_recipe([workplace(place)], [])
    shown = inspect_data.show(resolved.recipe, row="0")
    trained = [[t["text"] for t in leaf["tokens"] if t["weight"] > 0] for leaf in shown["leaves"]]
    assert trained == [["\n"], ["\n"]]  # what this template ends every conversation with


def test_an_architecture_without_a_classifier_is_named(tmp_path: Path) -> None:
    workplace(tmp_path)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config |= {"model_type": "granite", "architectures": ["GraniteForCausalLM"]}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    resolved = pipeline.resolve_recipe([tmp_path / "recipe.yaml"], [])
    with pytest.raises(ModelError, match="no sequence classifier of the architecture `granite`"):
        trainable_policy(find_base(resolved.recipe))
