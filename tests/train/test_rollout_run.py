"""Runs of grpo, rloo and ppo as people make them: they learn, resume to the last bit, and every command takes them."""

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
from tunedock.errors import DataError, InterruptedRun
from tunedock.events import Emitter
from tunedock.recipe.schema import Recipe
from tunedock.run.record import Run
from tunedock.run.stop import StopRequest
from tunedock.train import rollout
from tunedock.train.stage import train

REWARDS = '''
def even(prompts, completions, completion_ids, **columns):
    """The share of tokens with an even number: whatever the text, there is something to learn."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def near(prompts, completions, answer, **columns):
    return [-abs(len(one[0]["content"]) - len(wanted)) / 10 for one, wanted in zip(completions, answer)]
'''

ROWS = [{"prompt": f"How many hours are in {n} days? 你好", "answer": f"{24 * n}"} for n in range(1, 17)]

OBJECTIVES = {
    "grpo": "{kind: grpo, num_generations: 4, beta: 0.1, num_iterations: 2, steps_per_generation: 2, ",
    "rloo": "{kind: rloo, num_generations: 2, num_iterations: 2, ",
    "ppo": "{kind: ppo, num_ppo_epochs: 2, steps_per_generation: 2, target_kl: 0.5, ",
}


def workplace(folder: Path, objective: str = "grpo", *, more: str = "", **train: Any) -> Path:
    if not (folder / "base").exists():
        save_tiny("qwen3", folder / "base")
    (folder / "rewards.py").write_text(REWARDS)
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    settings = {
        "max_steps": 8, "batch_size": 4, "learning_rate": 5.0e-3, "bf16": False, "token_budget": 256, "save_steps": 3,
        "eval_strategy": "steps", "eval_steps": 4, "report_to": "none", "save_total_limit": None, **train,
    }  # fmt: skip
    rewards = "rewards: [{path: rewards.py, name: even}, {path: rewards.py, name: near, weight: 0.1}]"
    (folder / "recipe.yaml").write_text(
        f"model: ./base\nobjective: {OBJECTIVES[objective]}max_new_tokens: 12, {rewards}{more}}}\n"
        "adapter: {kind: lora, r: 4, alpha: 8}\n"
        "data: {train: rows.jsonl, max_length: 64, cache_dir: ./cache, split: {validation: 0.25, test: 0.25}}\n"
        f"train: {json.dumps(settings)}\noffline: true\n"
    )
    return folder


def begin(folder: Path, name: str, *overrides: str) -> tuple[Run, Recipe]:
    resolved = pipeline.resolve_recipe([folder / "recipe.yaml"], [f"train.output_dir={folder / name}", *overrides])
    return pipeline.create_run(resolved), resolved.recipe


def trained(run: Run, recipe: Recipe, *, resume: bool = False, stop: StopRequest | None = None) -> dict[str, Any]:
    return train(run, recipe, Emitter.to_file(run.events), resume=resume, stop=stop or StopRequest())


def metrics(run: Run) -> list[dict[str, float]]:
    """What each step and evaluation measured, without what a clock measured."""
    events = [json.loads(line) for line in run.events.read_text().splitlines()]
    clocked = ("tokens_per_second", "seconds", "memory", "utilisation", "rss")
    return [
        {"step": e["step"], **{k: v for k, v in e["values"].items() if not any(word in k for word in clocked)}}
        for e in events
        if e["kind"] == "metrics"
    ]


@pytest.mark.parametrize(
    ("objective", "steps"),
    [
        ("grpo", (3, 6)),
        ("rloo", (3,)),
        ("ppo", (3,)),
        *(pytest.param(name, (6,), marks=pytest.mark.long) for name in ("rloo", "ppo")),
    ],
)
def test_resuming_is_bit_identical(tmp_path: Path, objective: str, steps: tuple[int, ...]) -> None:
    """From the middle of a rollout, whose answers no policy would give again, and from the beginning of one."""
    workplace(tmp_path, objective)
    run, recipe = begin(tmp_path, "straight")
    trained(run, recipe)
    wanted, told = load_file(run.model / "adapter_model.safetensors"), metrics(run)
    assert not any("value_head" in name for name in wanted)
    for kept in (f"step-{step:08d}" for step in steps):
        again = Run(tmp_path / f"again-{kept}")
        shutil.copytree(run.path, again.path)
        for folder in again.checkpoints.glob("step-*"):
            if folder.name > kept:
                shutil.rmtree(folder)
        shutil.rmtree(again.model)
        again.events.write_text("")
        trained(again, recipe, resume=True)
        got = load_file(again.model / "adapter_model.safetensors")
        assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())
        first = int(kept[-2:])
        assert metrics(again) == [entry for entry in told if entry["step"] > first]
    middle = run.checkpoints / "step-00000003" / "feed.safetensors"
    assert middle.is_file(), "answers in use are kept"
    assert {"reward", "rewards/even", "rewards/near", "completions/mean_length", "loss"} <= told[0].keys()
    evaluation = next(entry for entry in told if "eval_reward" in entry)
    assert evaluation["eval_loss"] == pytest.approx(-evaluation["eval_reward"])


def test_stopped_while_answers_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rollout is thrown away, and made again alike."""
    workplace(tmp_path)
    run, recipe = begin(tmp_path, "straight")
    trained(run, recipe)
    cut, _ = begin(tmp_path, "cut")
    stop = StopRequest()
    made = rollout.RolloutFeed._make

    def stopping(self: rollout.RolloutFeed, number: int, step: int) -> None:
        if number == 1 and not stop.asked():
            monkeypatch.setattr(stop, "asked", lambda: True)
        made(self, number, step)

    monkeypatch.setattr(rollout.RolloutFeed, "_make", stopping)
    with pytest.raises(InterruptedRun, match="after step 4"):
        trained(cut, recipe, stop=stop)
    monkeypatch.undo()
    trained(cut, recipe, resume=True)
    one, other = (load_file(r.model / "adapter_model.safetensors") for r in (run, cut))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_all_answers_cut_off(tmp_path: Path) -> None:
    workplace(tmp_path, more=", mask_truncated_completions: true")
    run, recipe = begin(tmp_path, "run", "objective.max_new_tokens=1")
    with pytest.raises(DataError, match="cut off at 1 tokens"):
        trained(run, recipe)


LEARNING = {
    "grpo": (24, "{kind: grpo, num_generations: 8, "),
    "rloo": (32, "{kind: rloo, num_generations: 4, beta: 0.01, "),
    "ppo": (64, "{kind: ppo, num_ppo_epochs: 2, steps_per_generation: 2, kl_coef: 0.005, "),
}
"""Steps, and the objective. The divergence costs less than by default: what is asked for here is far from the model's own way."""


@pytest.mark.long
@pytest.mark.parametrize("objective", LEARNING)
def test_a_programmatic_reward_rises_by_half_of_what_is_left(objective: str, tmp_path: Path) -> None:
    """Answers of the demo's model become brief: one token of forty less is worth a fortieth."""
    steps, settings = LEARNING[objective]
    demo = Path(__file__).parents[2] / "examples" / "demo"
    (tmp_path / "rewards.py").write_text(
        "def brief(prompts, completions, completion_ids, **columns):\n"
        "    return [1 - min(len(ids), 40) / 40 for ids in completion_ids]\n"
    )
    (tmp_path / "recipe.yaml").write_text(
        f"model: {demo / 'base'}\n"
        f"objective: {settings}max_new_tokens: 24, rewards: ['rewards.py:brief']}}\n"
        "adapter: {kind: lora, r: 8, alpha: 16}\n"
        f"data: {{train: {demo / 'triage.jsonl'}, max_length: 256, cache_dir: ./cache}}\n"
        f"train: {{max_steps: {steps}, batch_size: 32, learning_rate: 3.0e-3, save_strategy: 'no', report_to: none,\n"
        "        eval_strategy: 'no'}\n"
        "offline: true\n"
    )
    run, recipe = begin(tmp_path, "run")
    trained(run, recipe)
    rewards = [entry["rewards/brief"] for entry in metrics(run) if "rewards/brief" in entry]
    start, end = rewards[0], sum(rewards[-3:]) / 3
    assert end > start + 0.5 * (1.0 - start), (start, end)
