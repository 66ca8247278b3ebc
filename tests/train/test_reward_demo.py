"""A reward model of the demo, end to end: sft, its export as the base, then pairs; held out are all of preferences.jsonl."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from tunedock import pipeline
from tunedock.eval.stage import evaluate
from tunedock.events import Emitter
from tunedock.export.stage import export
from tunedock.recipe.exporting import Order
from tunedock.recipe.schema import Recipe
from tunedock.run.record import Run
from tunedock.run.stop import StopRequest
from tunedock.train.stage import train

DEMO = Path(__file__).parents[2] / "examples" / "demo"
RECIPE = """
model: sft
objective: reward
adapter: {kind: lora, r: 32}
data:
  train: pairs.jsonl
  validation: PREFERENCES
  split: {train: 1.0, validation: 0, test: 0}
  max_length: 256
train: {num_train_epochs: 4, batch_size: 16, learning_rate: 1.0e-3, warmup_steps: 0.05, save_strategy: 'no', report_to: none}
offline: true
"""
PAIRS = 6000
"""To file a message takes the base most of what it has: with half as many it ranks seven in eight."""


def trained(recipe: Path, *overrides: str) -> tuple[Run, Recipe]:
    resolved = pipeline.resolve_recipe([recipe], overrides)
    run = pipeline.create_run(resolved)
    train(run, resolved.recipe, Emitter.to_file(run.events), resume=False, stop=StopRequest())
    return run, resolved.recipe


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_it_ranks_pairs_it_has_not_seen(tmp_path: Path) -> None:
    """The pairs trained on are made as those of preferences.jsonl are, from other messages."""
    spec = importlib.util.spec_from_file_location("demo_make_data", DEMO / "make_data.py")
    assert spec is not None and spec.loader is not None
    make_data = importlib.util.module_from_spec(spec)
    sys.modules["demo_make_data"] = make_data  # its dataclasses look themselves up
    spec.loader.exec_module(make_data)
    held_out = [json.loads(line) for line in (DEMO / "preferences.jsonl").read_text(encoding="utf-8").splitlines()]
    made = list(make_data.pairs(11, PAIRS, {row["prompt"][-1]["content"] for row in held_out}))
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made))
    cache = f"data.cache_dir={tmp_path / 'cache'}"

    alone = ("train.eval_strategy=no", "train.save_strategy=no", "train.report_to=none")
    first, recipe = trained(DEMO / "recipe.yaml", f"train.output_dir={tmp_path / 'first'}", cache, *alone)
    export(first, recipe, Emitter(None), order=Order(to=str(tmp_path / "sft"), format="hf"))
    text = RECIPE.replace("PREFERENCES", str(DEMO / "preferences.jsonl"))
    (tmp_path / "reward.yaml").write_text(text)
    run, recipe = trained(tmp_path / "reward.yaml", f"train.output_dir={tmp_path / 'run'}", cache)
    found = evaluate(run, recipe, Emitter(None), side="validation", options=recipe.eval)
    assert found["tuned"]["pairs"] == 400
    assert found["tuned"]["accuracy"] > 0.9 and found["tuned"]["margin"] > 1
