"""Recipes for real models: each fits the card it names, without a network, and trains a small model of the same architecture."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from families import tokenizer
from tunedock import pipeline
from tunedock.events import Emitter
from tunedock.plan.cards import Target, card
from tunedock.plan.shapes import find_shape
from tunedock.recipe.load import load
from tunedock.recipe.schema import Model
from tunedock.run.stop import StopRequest
from tunedock.train.stage import train

RECIPES = sorted((Path(__file__).parents[2] / "recipes" / "models").glob("*.yaml"))
SMALL = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "max_position_embeddings": 2048,
}  # fmt: skip


def command(path: Path) -> tuple[str, Target]:
    """What its first line plans: the file, and the cards it says it is for."""
    found = re.search(r"`tunedock plan (\S+) --gpu (\S+?)`", path.read_text().splitlines()[0])
    assert found is not None
    name, gpu = found.groups()
    return name, card(gpu, load([path]).recipe.launch.devices(0))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_fits_the_card_it_names(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    name, target = command(path)
    assert name == path.name
    found = pipeline.plan([path], target=target, rows=1000)
    assert found.spread.zero == (3 if target.devices > 1 else 0)
    assert found.fits and found.known_family and found.shape_source == "the shapes of well-known models"
    assert found.steps is not None and found.steps.steps_per_epoch == 50


def _by_architecture() -> list[Any]:
    """Each architecture and each quantisation once; the others are long."""
    seen: set[str] = set()
    made = []
    for path in RECIPES:
        recipe = load([path]).recipe
        kinds = {str(find_shape(recipe.model).config["model_type"]), recipe.quantize}
        made.append(pytest.param(path, id=path.stem, marks=[pytest.mark.long] if kinds <= seen else []))
        seen |= kinds
    return made


@pytest.mark.parametrize("path", _by_architecture())
def test_a_recipe_trains_a_small_model_of_the_same_architecture(path: Path, tmp_path: Path) -> None:
    recipe = load([path]).recipe
    text = tokenizer("qwen3")
    shape = {**find_shape(Model(path=recipe.model.path)).config, **SMALL, "vocab_size": len(text)}
    shape |= {"pad_token_id": text.pad_token_id, "eos_token_id": text.eos_token_id, "bos_token_id": text.eos_token_id}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(shape.pop("model_type"), **shape)).save_pretrained(
        tmp_path / "base"
    )
    text.save_pretrained(tmp_path / "base")
    changes = [
        f"model={tmp_path / 'base'}", f"train.output_dir={tmp_path / 'run'}", f"data.cache_dir={tmp_path / 'cache'}",
        "train.max_steps=2", "train.eval_strategy=no", "train.optim=adamw_torch", "train.batch_size=4",
        "data.train.0.num_samples=30", "train.report_to=none", "parallel=auto", "launch={on: local}",
    ]  # fmt: skip
    resolved = pipeline.resolve_recipe([path], changes)
    run = pipeline.create_run(resolved)
    done = train(run, resolved.recipe, Emitter.to_file(run.events), resume=False, stop=StopRequest())
    assert done["steps"] == 2 and (run.model / "chat.json").is_file()
