"""Golden loss curves: a refactor leaves them as they are; an intended change rewrites them and says why.

python -m pytest tests/train/test_golden.py --rewrite-golden
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from families import save_tiny
from tunedock import pipeline
from tunedock.events import Emitter
from tunedock.run.stop import StopRequest
from tunedock.train.stage import train

GOLDEN = Path(__file__).parents[1] / "golden"
SUMS = [(a, b) for a in range(3, 9) for b in range(2, 7)]


def rows(objective: str) -> list[dict[str, object]]:
    if objective == "pretrain":
        return [
            {"text": f"def add(a, b):\n    return a + b\n\nadd({a}, {b})  # {a + b}\n" * (1 + a % 3)} for a, b in SUMS
        ]
    if objective in ("dpo", "reward", "orpo", "simpo", "kto"):
        return [
            {
                "prompt": f"How many hours are in {a} and {b} days? 你好",
                "chosen": f"There are {24 * a} hours and {24 * b} hours.",
                "rejected": f"{a + b} days are a long time, I do not know" + "." * (1 + a % 3),
            }
            for a, b in SUMS
        ]
    return [
        {
            "messages": [
                {"role": "system", "content": "You are a helpful assistant."},
                {"role": "user", "content": f"How many hours are in {a} and {b} days? 你好"},
                {"role": "assistant", "content": f"There are {24 * a} hours and {24 * b} hours."},
            ]
        }
        for a, b in SUMS
    ]


LENGTHS = {"epochs": "num_train_epochs: 2", "steps": "max_steps: 10, eval_strategy: steps, eval_steps: 5"}
REWARDS = '"rewards.py:even"'
ROLLOUTS = {
    "grpo": f"{{kind: grpo, num_generations: 5, beta: 0.1, max_new_tokens: 10, rewards: [{REWARDS}]}}",
    "rloo": f"{{kind: rloo, num_generations: 5, max_new_tokens: 10, rewards: [{REWARDS}]}}",
    "ppo": f"{{kind: ppo, num_ppo_epochs: 2, max_new_tokens: 10, rewards: [{REWARDS}]}}",
}
EVEN = """
def even(prompts, completions, completion_ids, **columns):
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]
"""
KEYS = ("loss", "eval_loss", "learning_rate", "grad_norm", "tokens")
QUICK = {("sft", "full"), ("sft", "freeze"), ("dpo", "full")}
"""Beside the LoRA of each objective."""
CURVES = [
    pytest.param(
        objective, adapter, marks=() if adapter == "lora" or (objective, adapter) in QUICK else pytest.mark.long
    )
    for objective in ("sft", "pretrain", "dpo", "reward", "orpo", "simpo", "kto")
    for adapter in ("lora", "full", "freeze")
] + [pytest.param(objective, "full") for objective in ROLLOUTS]


@pytest.mark.parametrize(("objective", "adapter"), CURVES)
def test_the_curve_is_the_golden_one(objective: str, adapter: str, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    save_tiny("qwen3", tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows(objective)))
    (tmp_path / "rewards.py").write_text(EVEN)
    length = "epochs" if objective not in ROLLOUTS else "steps"
    kind = "{kind: freeze, last_n_layers: 1}" if adapter == "freeze" else adapter
    (tmp_path / "recipe.yaml").write_text(
        f"model: ./base\nobjective: {ROLLOUTS.get(objective, objective)}\nadapter: {kind}\n"
        "data: {train: rows.jsonl, max_length: 64, cache_dir: ./cache}\n"
        f"train: {{{LENGTHS[length]}, batch_size: 5, learning_rate: 5.0e-3, warmup_steps: 2, bf16: false, token_budget: 256,\n"
        "        save_strategy: 'no', report_to: none}\n"
    )
    resolved = pipeline.resolve_recipe([tmp_path / "recipe.yaml"], [f"train.output_dir={tmp_path / 'run'}"])
    run = pipeline.create_run(resolved)
    train(run, resolved.recipe, Emitter.to_file(run.events), resume=False, stop=StopRequest())
    events = [json.loads(line) for line in run.events.read_text().splitlines()]
    got = {
        key: [round(e["values"][key], 6) for e in events if e["kind"] == "metrics" and key in e["values"]]
        for key in (*KEYS, *(("reward", "kl") if objective in ROLLOUTS else ()))
    }
    path = GOLDEN / f"{objective}-{adapter}.json"
    if pytestconfig.getoption("rewrite_golden"):
        path.write_text(json.dumps(got, indent=1) + "\n")
    wanted = json.loads(path.read_text())
    assert got.keys() == wanted.keys()
    for key, curve in wanted.items():
        assert got[key] == pytest.approx(curve, rel=2e-3 if key == "grad_norm" else 2e-4, abs=2e-6), key


def test_the_golden_curves_are_learning_curves() -> None:
    for path in GOLDEN.glob("*.json"):
        told = json.loads(path.read_text())
        assert len(told["loss"]) >= 10, path.name
        if "reward" not in told:  # the loss of a policy gradient says nothing of how good it is
            assert told["loss"][-1] < told["loss"][0], path.name
