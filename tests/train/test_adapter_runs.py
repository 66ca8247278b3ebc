"""Whole runs of every kind of adapter: stopped and gone on with to the bit, and exported as models that others read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from families import save_tiny, tokenizer
from tunedock import pipeline
from tunedock.errors import ModelError, RecipeError, RunError, TunedockError
from tunedock.eval.stage import evaluate
from tunedock.events import Emitter
from tunedock.export import stage as exporting
from tunedock.model.session import base_policy, find_base, tuned_policy
from tunedock.recipe.exporting import Order
from tunedock.recipe.schema import Recipe
from tunedock.run.record import Run
from tunedock.run.stop import StopRequest
from tunedock.train.beginning import FILE
from tunedock.train.checkpoint import Checkpoints
from tunedock.train.stage import train

QUIET = Emitter(None)
IDS = torch.arange(1, 40)[None]
TOKENS = ["model.add_tokens=[<hours>]", "model.add_special_tokens=[<|day|>]"]
LONG = pytest.mark.long

KINDS: dict[str, list[str]] = {
    "dora": ["adapter.use_dora=true", "adapter.r=4"],
    "pissa": ["adapter.init_lora_weights=pissa_niter_4", "adapter.r=4", "adapter.loraplus_lr_ratio=4"],
    "modules": ["adapter.modules_to_save=[norm,lm_head]", "adapter.r=4"],
    "tokens": [*TOKENS, "adapter.r=4"],
    "tokens-untied": [*TOKENS, "adapter.r=4", "model.path=./untied"],
    "tokens-full": [*TOKENS, "adapter=full"],
    "first-layers": ["adapter={kind: freeze, first_n_layers: 1, layer_modules: [mlp]}"],
    "on": ["adapter.continue_from=./runs/dora"],
    "beneath": ["model.adapters=[./runs/dora, ./runs/pissa/model]", "adapter.r=2"],
    "beneath-full": ["model.adapters=[./runs/dora]", "adapter=full"],
}

Made = Callable[[str], tuple[Run, Recipe]]


def resolved(place: Path, name: str, *overrides: str) -> Any:
    recipe = place / "recipe.yaml"
    return pipeline.resolve_recipe([recipe], [*overrides, f"train.output_dir={place / 'runs' / name}"])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bases in float32, one without a row to spare for new tokens; data that hold these, a recipe."""
    place = tmp_path_factory.mktemp("adapters")
    save_tiny("qwen3", place / "base", tie_word_embeddings=True)
    save_tiny("qwen3", place / "untied", seed=1, tie_word_embeddings=False, vocab_size=len(tokenizer("qwen3")))
    rows = [
        {"prompt": f"How many <hours> are in {n} days?", "response": f"There are {24 * n} <hours>."} for n in range(30)
    ]
    (place / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (place / "recipe.yaml").write_text(
        "model: ./base\ndata: {train: rows.jsonl, max_length: 128, cache_dir: ./cache}\n"
        "train: {max_steps: 4, batch_size: 8, save_steps: 2, learning_rate: 1.0e-2, bf16: false, eval_strategy: 'no'}\n"
        "eval: {max_new_tokens: 4, max_samples: 2}\n"
    )
    return place


@pytest.fixture(scope="module")
def made(place: Path) -> Made:
    """The run of a kind, trained the first time it is asked for, those it needs before it."""
    runs: dict[str, tuple[Run, Recipe]] = {}

    def make(name: str) -> tuple[Run, Recipe]:
        if name not in runs:
            for other in ("dora", "pissa"):
                if other != name and any(f"runs/{other}" in text for text in KINDS[name]):
                    make(other)
            given = [text.replace("./", f"{place}/") for text in KINDS[name]]
            found = resolved(place, name, *given)
            run = pipeline.create_run(found)
            train(run, found.recipe, Emitter.to_file(run.events), resume=False, stop=StopRequest())
            runs[name] = (run, found.recipe)
        return runs[name]

    return make


def events(run: Run, kind: str) -> list[dict[str, Any]]:
    return [e for e in map(json.loads, run.events.read_text().splitlines()) if e["kind"] == kind]


def result(run: Run) -> dict[str, Tensor]:
    (file,) = run.model.glob("*.safetensors")
    return load_file(file)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(IDS).logits


def away(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max())


def kinds(names: list[str], *, quick: str) -> list[Any]:
    return [pytest.param(name, marks=() if name in quick.split() else LONG) for name in names]


@pytest.mark.parametrize("name", kinds(list(KINDS), quick="pissa on"))
def test_stopped_and_gone_on_with_it_is_the_same_to_the_bit(name: str, made: Made, tmp_path: Path) -> None:
    run, recipe = made(name)
    copy = Run.open(Path(shutil.copytree(run.path, tmp_path / name)))
    last = Checkpoints(copy.checkpoints, keep=None).index().last
    shutil.rmtree(copy.checkpoints / str(last))
    shutil.rmtree(copy.model)
    train(copy, recipe, QUIET, resume=True, stop=StopRequest())
    before, after = result(run), result(copy)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", kinds(list(KINDS), quick="tokens-untied beneath"))
def test_the_export_is_read_by_plain_transformers(name: str, made: Made, tmp_path: Path) -> None:
    run, recipe = made(name)
    checks = exporting.export(run, recipe, QUIET, order=Order(to=str(tmp_path / "hf"), format="hf"))["checks"]
    assert checks["merged_difference"] < 1e-5 and checks["file_difference"] < 1e-5, checks
    assert checks["same_top_token"] == 1.0 and checks["changed_tensors"] > 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    words = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert away(logits(model), logits(tuned_policy(find_base(recipe), run.model).model)) < 1e-5
    tied = recipe.model.path.endswith("base")
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    if "tokens" in name:
        ids = words("<hours><|day|>", add_special_tokens=False)["input_ids"]
        assert len(ids) == 2 and max(ids) < model.config.vocab_size == len(model.model.embed_tokens.weight)
        assert words.decode(ids, skip_special_tokens=True) == "<hours>"


@pytest.mark.parametrize(
    "name", kinds(["dora", "pissa", "modules", "tokens", "tokens-untied", "on"], quick="tokens-untied")
)
def test_the_adapter_alone_is_read_by_plain_peft(name: str, made: Made, tmp_path: Path) -> None:
    run, recipe = made(name)
    exporting.export(run, recipe, QUIET, order=Order(to=str(tmp_path / "adapter"), format="adapter"))
    base = AutoModelForCausalLM.from_pretrained(recipe.model.path)
    words = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    if len(words) > base.config.vocab_size:
        assert name == "tokens-untied"
        base.resize_token_embeddings(len(words))
    with_adapter = PeftModel.from_pretrained(base, tmp_path / "adapter")
    exporting.export(run, recipe, QUIET, order=Order(to=str(tmp_path / "hf"), format="hf"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert away(logits(with_adapter), logits(merged)) < 1e-5
    held = sum(tensor.numel() for tensor in load_file(tmp_path / "adapter" / "adapter_model.safetensors").values())
    if "tokens" in name:
        assert held < base.model.embed_tokens.weight.numel(), "the rows that are new, not the whole matrix"


def test_new_tokens_are_told_and_trained(made: Made) -> None:
    run, recipe = made("tokens-untied")
    said = [event["message"] for event in events(run, "note")]
    assert any("2 new tokens" in message for message in said), said
    base = find_base(recipe)
    assert base.tokenizer.convert_ids_to_tokens(list(base.new_ids)) == ["<hours>", "<|day|>"]
    began = load_file(run.path / FILE)
    rows = sorted(name for name in began if "trainable_tokens_delta" in name)
    trained = sorted(name for name in result(run) if "trainable_tokens_delta" in name)
    for name, now in zip(rows, trained, strict=True):
        before, after = began[name], result(run)[now]
        assert after.shape == before.shape == (2, 64)
        assert float((after[0] - before[0]).abs().max()) > 1e-3, "a token of the rows"


def test_the_shape_of_an_adapter_gone_on_with_is_its_own(made: Made, place: Path) -> None:
    _, recipe = made("on")
    adapter: Any = recipe.adapter
    assert (adapter.r, adapter.alpha, adapter.use_dora) == (4, 8.0, True)
    started, trained = result(made("dora")[0]), result(made("on")[0])
    assert started.keys() == trained.keys()
    assert not all(torch.equal(started[name], trained[name]) for name in started)
    base = find_base(recipe)
    was = tuned_policy(find_base(made("dora")[1]), made("dora")[0].model).model
    assert torch.equal(logits(base_policy(base).model), logits(was)), "the base beside it is the adapter as it was"
    with pytest.raises(RecipeError, match=r"adapter\.r: 8.* has 4"):
        resolved(place, "x", f"adapter.continue_from={place}/runs/dora", "adapter.r=8")
    again = resolved(place, "x", f"adapter.continue_from={place}/runs/dora", "adapter.r=4", "adapter.dropout=0.1")
    assert again.recipe.adapter.dropout == 0.1
    assert again.origins["adapter.alpha"] == "derived: adapter.continue_from"


def test_what_is_beneath_must_stay_as_it_was(made: Made, place: Path, tmp_path: Path) -> None:
    run, recipe = made("beneath")
    with pytest.raises(RecipeError, match="other adapters merged"):
        exporting.export(run, recipe, QUIET, order=Order(to=str(tmp_path / "adapter"), format="adapter"))
    file = place / "runs" / "dora" / "model" / "adapter_model.safetensors"
    whole = file.read_bytes()
    tensors = load_file(file)
    try:
        save_file({name: tensor + 1e-3 for name, tensor in tensors.items()}, file, {"format": "pt"})
        with pytest.raises(ModelError, match="not what it was"):
            tuned_policy(find_base(recipe), run.model)
        with pytest.raises(RunError, match="not what this run began with"):
            train(run, recipe, QUIET, resume=True, stop=StopRequest())
    finally:
        file.write_bytes(whole)


def test_a_run_that_lost_its_beginning_does_not_go_on(made: Made, tmp_path: Path) -> None:
    run, recipe = made("pissa")
    copy = Run.open(Path(shutil.copytree(run.path, tmp_path / "copy")))
    (copy.path / FILE).unlink()
    with pytest.raises(RunError, match="what it began with is gone"):
        train(copy, recipe, QUIET, resume=True, stop=StopRequest())
    (copy.path / FILE).write_bytes(b"no tensors")
    with pytest.raises(RunError, match="cannot be read"):
        train(copy, recipe, QUIET, resume=True, stop=StopRequest())


def test_new_tokens_that_nothing_trains_are_refused(place: Path) -> None:
    found = resolved(place, "frozen", *TOKENS, "adapter={kind: freeze, last_n_layers: 1}")
    run = pipeline.create_run(found)
    with pytest.raises(ModelError, match="would learn nothing"):
        train(run, found.recipe, QUIET, resume=False, stop=StopRequest())


@LONG
def test_a_preference_run_goes_on_from_an_adapter(made: Made, place: Path) -> None:
    """The reference, in training and in evaluation, is the adapter as it began."""
    made("dora")
    pairs = [
        {"prompt": f"How many hours are in {n} days?", "chosen": f"There are {24 * n}.", "rejected": "I do not know."}
        for n in range(30)
    ]
    (place / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    found = resolved(
        place, "dpo", "objective=dpo", f"data.train={place}/pairs.jsonl", f"adapter.continue_from={place}/runs/dora"
    )
    run = pipeline.create_run(found)
    train(run, found.recipe, Emitter.to_file(run.events), resume=False, stop=StopRequest())
    first = next(e["values"] for e in events(run, "metrics") if "loss" in e["values"])
    assert first["loss"] == pytest.approx(0.6931, abs=1e-4), "nothing is preferred before the first step"
    assert any("a copy of what is trained" in e["message"] for e in events(run, "note"))
    measured = evaluate(run, found.recipe, QUIET, side="test", options=found.recipe.eval)
    assert measured["tuned"]["loss"] < 0.6931
    assert "loss" not in measured["base"]


def test_errors_are_ours(place: Path) -> None:
    for given in (
        [f"adapter.continue_from={place}/base"],
        [f"model.adapters=[{place}/nothing]"],
        ["adapter.continue_from=''"],
    ):
        with pytest.raises(TunedockError):
            resolved(place, "x", *given)
