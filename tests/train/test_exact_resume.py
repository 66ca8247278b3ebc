"""Every objective goes on to the last bit: from the middle of an epoch, from its end, in the next one; shuffled, in packed rows,
with dropout, validation and the best checkpoint kept. From data to model, by the stage. ppo, grpo, rloo: test_rollout_run.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from families import save_tiny
from tunedock import pipeline
from tunedock.events import Emitter
from tunedock.recipe.schema import Recipe
from tunedock.run.record import Run
from tunedock.run.stop import StopRequest
from tunedock.train.stage import train

PER_EPOCH = 5
STEPS = 2 * PER_EPOCH + 2
PAIRS = ("dpo", "orpo", "simpo", "kto", "reward")


def rows(objective: str) -> list[dict[str, Any]]:
    if objective == "pretrain":
        return [{"text": f"{n} " + "hours in a day " * (1 + n % 9)} for n in range(20)]
    asked = [f"How many hours are in {n} days? " + "Please. " * (n % 5) for n in range(20)]
    if objective in PAIRS:
        return [
            {"prompt": text, "chosen": f"{24 * n} hours", "rejected": "I do not know" * (1 + n % 2)}
            for n, text in enumerate(asked)
        ]
    return [{"prompt": text, "response": f"There are {24 * n} hours."} for n, text in enumerate(asked)]


def begin(folder: Path, name: str, objective: str, data: str = "") -> tuple[Run, Recipe]:
    if not (folder / "base").exists():
        save_tiny("qwen3", folder / "base")
        (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows(objective))))
    (folder / "recipe.yaml").write_text(
        f"model: ./base\nobjective: {objective}\n"
        "adapter: {kind: lora, r: 4, alpha: 8, dropout: 0.1}\n"
        f"data: {{train: rows.jsonl, validation: rows.jsonl, max_length: 96, cache_dir: ./cache, {data}"
        "split: {train: 1, validation: 0, test: 0}}\n"
        f"train: {{max_steps: {STEPS}, batch_size: 4, learning_rate: 5.0e-3, bf16: false, token_budget: 128, save_steps: 1, "
        "eval_strategy: steps, eval_steps: 2, load_best_model_at_end: true, save_total_limit: null, report_to: none}\n"
        "offline: true\n"
    )
    resolved = pipeline.resolve_recipe([folder / "recipe.yaml"], [f"train.output_dir={folder / name}"])
    return pipeline.create_run(resolved), resolved.recipe


def trained(run: Run, recipe: Recipe, *, resume: bool = False) -> None:
    train(run, recipe, Emitter.to_file(run.events), resume=resume, stop=StopRequest())


def told(run: Run) -> list[dict[str, Any]]:
    """Losses and evaluations."""
    events = [json.loads(line) for line in run.events.read_text().splitlines()]
    return [
        {"step": event["step"], **{key: value for key, value in event["values"].items() if key.endswith("loss")}}
        for event in events
        if event["kind"] == "metrics"
    ]


def same_to_the_bit(folder: Path, run: Run, recipe: Recipe, steps: tuple[int, ...]) -> None:
    last = f"step-{STEPS:08d}"
    for step in steps:
        again = Run(folder / f"again-{step}")
        shutil.copytree(run.path, again.path)
        for place in again.checkpoints.glob("step-*"):
            if place.name > f"step-{step:08d}":
                shutil.rmtree(place)
        shutil.rmtree(again.model)
        again.events.write_text("")
        trained(again, recipe, resume=True)
        assert told(again) == [entry for entry in told(run) if entry["step"] > step], step
        for name in ("trained", "optimizer", "random"):
            wanted = load_file(run.checkpoints / last / f"{name}.safetensors")
            got = load_file(again.checkpoints / last / f"{name}.safetensors")
            assert wanted.keys() == got.keys() and all(torch.equal(got[key], wanted[key]) for key in wanted), (
                step,
                name,
            )
        for file in run.model.glob("*.safetensors"):
            assert file.read_bytes() == (again.model / file.name).read_bytes(), step
        states = [json.loads((one.checkpoints / last / "state.json").read_text()) for one in (run, again)]
        assert states[0] == states[1], step


@pytest.mark.parametrize(
    "objective",
    ["sft", *(pytest.param(name, marks=pytest.mark.long) for name in ("pretrain", *PAIRS))],
)
def test_an_objective_goes_on_to_the_last_bit(tmp_path: Path, objective: str) -> None:
    run, recipe = begin(tmp_path, "straight", objective)
    trained(run, recipe)
    steps = (PER_EPOCH + 2,) if objective == "sft" else (3, PER_EPOCH, PER_EPOCH + 2)
    same_to_the_bit(tmp_path, run, recipe, steps)


@pytest.mark.long
@pytest.mark.parametrize("objective", ["sft", "pretrain"])
def test_a_stream_goes_on_to_the_last_bit_and_says_what_it_passes_over(tmp_path: Path, objective: str) -> None:
    run, recipe = begin(tmp_path, "straight", objective, data="streaming: true, shuffle_buffer: 7, ")
    trained(run, recipe)
    same_to_the_bit(tmp_path, run, recipe, (3, PER_EPOCH, PER_EPOCH + 2))
