"""The objectives on preferences learn from the demo's pairs: on held-out ones the chosen answer rises above the rejected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tunedock import pipeline
from tunedock.events import Emitter
from tunedock.recipe.schema import Recipe
from tunedock.run.record import Run
from tunedock.run.stop import StopRequest
from tunedock.train.stage import train

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.long


def run_of(folder: Path, name: str, *overrides: str) -> tuple[Run, Recipe]:
    """Forty steps of the recipe, measured on held-out pairs before the end."""
    given = [
        "train.max_steps=40", "train.save_strategy=no", "train.report_to=none", "train.eval_strategy=steps",
        "train.eval_steps=40", f"data.cache_dir={folder / 'cache'}", f"train.output_dir={folder / 'run'}", *overrides,
    ]  # fmt: skip
    resolved = pipeline.resolve_recipe([ROOT / "recipes" / f"{name}-lora.yaml"], given)
    run = pipeline.create_run(resolved)
    train(run, resolved.recipe, Emitter.to_file(run.events), resume=False, stop=StopRequest())
    return run, resolved.recipe


def values(run: Run) -> list[dict[str, Any]]:
    events = [json.loads(line) for line in run.events.read_text().splitlines()]
    return [e["values"] for e in events if e["kind"] == "metrics"]


@pytest.mark.parametrize(
    ("name", "figure", "least"),
    [
        ("kto", "eval_rewards/margins", 0.3),  # in units of beta times a log-ratio; 0 where it starts
        ("orpo", "eval_log_odds_chosen", 0.3),  # 0.04 where it starts
        ("simpo", "eval_rewards/margins", 0.3),  # 0.08 where it starts
    ],
)
def test_chosen_rises_above_rejected(tmp_path: Path, name: str, figure: str, least: float) -> None:
    run, _ = run_of(tmp_path, name, "train.learning_rate=3.0e-3")
    told = values(run)
    assert [v for v in told if figure in v][-1][figure] > least
    assert [v for v in told if "eval_loss" in v][-1]["eval_loss"] < told[0]["loss"]
