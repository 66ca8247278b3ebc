"""A GRPO run whose answers come from an engine (tests/stand_in_engine.py): it trains, it is checked, it survives the engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from families import save_tiny
from stand_in_engine import StandInEngine, serving
from tunedock import pipeline
from tunedock.errors import EngineError, RecipeError
from tunedock.events import Emitter
from tunedock.model.answers import Sampled
from tunedock.objective.credit import Measured
from tunedock.recipe.schema import Recipe
from tunedock.run.record import Run
from tunedock.run.stop import StopRequest
from tunedock.train.agreement import METRIC, Agreement
from tunedock.train.stage import train


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grpo")
    save_tiny("qwen3", folder / "base")
    rows = [{"prompt": f"How many hours are in {n} days?"} for n in range(1, 13)]
    (folder / "rewards.py").write_text(
        "def letters(completions, **columns):\n    return [float(len(set(str(one)))) for one in completions]\n"
    )
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def server(place: Path) -> Iterator[StandInEngine]:
    with serving(place / "base") as found:
        yield found


def resolved(place: Path, url: str, out: Path, *overrides: str) -> Any:
    (place / "recipe.yaml").write_text(
        "model: ./base\n"
        "objective:\n"
        "  kind: grpo\n  num_generations: 4\n  max_new_tokens: 4\n"
        "  rewards: ['rewards.py:letters']\n"
        f"  engine: {{kind: openai, base_url: '{url}', model: tiny, max_retries: 0}}\n"
        "adapter: {r: 4}\n"
        "data: {train: rows.jsonl, max_length: 64, cache_dir: ./cache, split: {validation: 0.2, test: 0.0}}\n"
        "train: {max_steps: 3, batch_size: 8, learning_rate: 5.0e-2, lr_scheduler_type: constant, bf16: false, "
        "token_budget: 256, report_to: none, eval_strategy: 'no'}\n"
    )
    return pipeline.resolve_recipe([place / "recipe.yaml"], [*overrides, f"train.output_dir={out}"])


def run_of(place: Path, url: str, out: Path, *overrides: str) -> tuple[Run, Recipe]:
    found = resolved(place, url, out, *overrides)
    run = pipeline.create_run(found)
    go(run, found.recipe)
    return run, found.recipe


def go(run: Run, recipe: Recipe, *, resume: bool = False) -> None:
    train(run, recipe, Emitter.to_file(run.events), resume=resume, stop=StopRequest())


def events(run: Run, kind: str) -> list[dict[str, Any]]:
    return [e for line in run.events.read_text().splitlines() if (e := json.loads(line))["kind"] == kind]


def steps(run: Run) -> list[dict[str, float]]:
    return [e["values"] for e in events(run, "metrics") if "loss" in e["values"]]


def test_a_run_trains_on_the_engines_answers(place: Path, server: StandInEngine, tmp_path: Path) -> None:
    evaluating = ["train.eval_strategy=steps", "train.eval_steps=2"]
    run, _ = run_of(place, server.url, tmp_path / "run", *evaluating, "objective.temperature=0.8", "train.max_steps=2")
    assert len(steps(run)) == 2
    assert all(values[METRIC] < 1e-3 and values["grad_norm"] > 0 for values in steps(run))
    assert events(run, "warning") == []
    assert len(server.loads) == 3  # two rollouts and an evaluation
    assert {body["temperature"] for body in server.requests} == {0.8, 0.0}
    assert server.adapters == {} and not (run.path / "engine").exists()
    assert (run.model / "adapter_config.json").is_file()


def test_an_engine_that_does_not_apply_the_adapter_is_found(
    place: Path, server: StandInEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.applies_adapters = False
    monkeypatch.setattr("tunedock.train.agreement.TOO_FAR", 0.05)  # a model as tiny as this one has no strong opinions
    run, _ = run_of(place, server.url, tmp_path / "run", "train.learning_rate=3.0")
    assert steps(run)[0][METRIC] < 1e-3 and steps(run)[-1][METRIC] > 0.05  # a fresh adapter is the base itself
    (warning,) = events(run, "warning")
    assert "does not apply the adapter it is given" in warning["message"]


@pytest.mark.long
def test_a_run_goes_on_after_the_engine_was_killed(place: Path, tmp_path: Path) -> None:
    with serving(place / "base") as server:
        expected, _ = run_of(place, server.url, tmp_path / "straight")
    with serving(place / "base") as server:
        port = int(server.url.split(":")[2].split("/")[0])
        server.misbehave = ["", "", "", "dies"]
        with pytest.raises(EngineError) as raised:
            run_of(place, server.url, tmp_path / "run")
        assert raised.value.where == server.url and raised.value.hint
    run = Run.open(tmp_path / "run")
    assert len(steps(run)) == 1
    assert "a checkpoint of step 1 is saved" in events(run, "note")[-1]["message"]
    recipe = resolved(place, server.url, tmp_path / "other").recipe
    with serving(place / "base", port=port) as server:
        go(run, recipe, resume=True)
        assert server.adapters == {}
    for one, other in zip(steps(run), steps(expected), strict=True):
        assert {name: one[name] for name in ("loss", "reward", "grad_norm")} == pytest.approx(
            {name: other[name] for name in ("loss", "reward", "grad_norm")}, rel=1e-6
        )


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("objective.engine.base_url=localhost:8000", "is no URL"),
        ("objective.engine.base_url=http://me:secret@host/v1", "holds a password"),
        ("objective.engine.adapter_dir_on_server=/there", "a folder that is not given"),
        ("adapter=full", "trains the model's own weights"),
    ],
)
def test_recipes_that_cannot_be_are_refused(place: Path, tmp_path: Path, override: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said) as raised:
        resolved(place, "http://localhost:8000/v1", tmp_path / "run", override)
    assert "secret" not in str(raised.value)


def test_a_shared_folder_is_relative_to_the_recipe(place: Path, tmp_path: Path) -> None:
    found = resolved(place, "http://localhost:8000/v1", tmp_path / "run", "objective.engine.adapter_dir=shared")
    assert Path(found.recipe.objective.engine.adapter_dir).is_absolute()


def agreement(temperature: float, at_one: float, said: list[str]) -> Agreement:
    return Agreement(lambda _, samples: [[np.full(2, at_one, np.float32)] for _ in samples], temperature, said.append)


@pytest.mark.parametrize(
    ("temperature", "engine", "mean"),
    [(1.0, -2.0, 0.0), (1.0, -2.25, 0.25), (0.5, -2.0, 0.0), (0.5, -3.0, 0.0), (0.5, -6.0, 3.0), (1.0, -3.0, 1.0)],
)
def test_the_nearer_of_both_readings_counts(temperature: float, engine: float, mean: float) -> None:
    """The policy says -2 at the temperature, -3 without."""
    said: list[str] = []
    made = [[Sampled((4, 5), False, (engine, engine))]]
    measured = [[Measured(1.0, 2, True, old_T=np.full(2, -2.0, np.float32), reference_T=None, value_T=None)]]
    check = agreement(temperature, -3.0, said)
    for _ in range(2):
        total, tokens = check([None], made, measured)[METRIC]  # type: ignore[list-item]
        assert (total / tokens, tokens) == (mean, 2.0)
    assert len(said) == (mean > 0.5)
    assert check([None], [[Sampled((4, 5), False)]], measured) == {}  # type: ignore[list-item]
