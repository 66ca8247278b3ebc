"""Runs that several processes train together, beside the same run of one process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from families import save_tiny
from tunedock import pipeline
from tunedock.events import Emitter
from tunedock.run.record import Run
from tunedock.run.stop import StopRequest
from tunedock.train.stage import train

TESTS = Path(__file__).parents[2]
LIMIT_S = 240

OBJECTIVES = {
    "sft": "sft",
    "dpo": "dpo",
    "kto": "kto",
    "reward": "reward",
    "grpo": "{kind: grpo, num_generations: 4, beta: 0.1, num_iterations: 2, max_new_tokens: 12, rewards: [ANSWERS]}",
    "ppo": "{kind: ppo, num_ppo_epochs: 2, steps_per_generation: 2, max_new_tokens: 12, rewards: [ANSWERS]}",
}

ADAPTERS = {
    "lora": "{kind: lora, r: 4, alpha: 8}",
    "dropout": "{kind: lora, r: 4, alpha: 8, dropout: 0.1}",
    "full": "full",
    "freeze": "{kind: freeze, last_n_layers: 1}",
}

REWARDS = """
def even(prompts, completions, completion_ids, **columns):
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]
"""

CLOCKED = ("second", "memory", "utilisation", "rss", "cpu")


def rows(objective: str) -> list[dict[str, Any]]:
    """Of different lengths, so that rows of a step are too."""
    asked = [(f"How many hours are in {n} days? 你好 {'x' * (n % 7 * 9)}", n) for n in range(1, 33)]
    if objective == "sft":
        return [
            {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": f"{24 * n} hours, {n}"}]}
            for q, n in asked
        ]
    if objective in ("dpo", "reward"):
        return [{"prompt": q, "chosen": f"{24 * n} hours", "rejected": f"{n}, no idea at all"} for q, n in asked]
    if objective == "kto":
        return [{"prompt": q, "completion": f"{24 * n} hours", "label": n % 2 == 0} for q, n in asked]
    return [{"prompt": q, "answer": f"{24 * n}"} for q, n in asked]


def workplace(folder: Path, objective: str, adapter: str = "lora", **settings: Any) -> Path:
    if not (folder / "base").exists():
        save_tiny("qwen3", folder / "base")
    (folder / "rewards.py").write_text(REWARDS)
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows(objective))))
    train_ = {
        "max_steps": 4, "batch_size": 8, "learning_rate": 5e-3, "bf16": False, "token_budget": 128, "save_steps": 2,
        "eval_strategy": "steps", "eval_steps": 2, "report_to": "none", "save_total_limit": None, **settings,
    }  # fmt: skip
    kind = OBJECTIVES[objective].replace("ANSWERS", "{path: rewards.py, name: even}")
    (folder / "recipe.yaml").write_text(
        f"model: ./base\nobjective: {kind}\nadapter: {ADAPTERS[adapter]}\noffline: true\n"
        "data: {train: rows.jsonl, max_length: 160, cache_dir: ./cache, split: {validation: 0.25, test: 0.0}}\n"
        f"train: {json.dumps(train_)}\n"
    )
    return folder


def begin(folder: Path, name: str, *overrides: str) -> Run:
    resolved = pipeline.resolve_recipe([folder / "recipe.yaml"], [f"train.output_dir={folder / name}", *overrides])
    return pipeline.create_run(resolved)


def alone(run: Run, *, resume: bool = False) -> Run:
    from tunedock.recipe.schema import Recipe

    recipe = Recipe.model_validate(run.resolved()["recipe"])
    train(run, recipe, Emitter.to_file(run.events), resume=resume, stop=StopRequest())
    return run


def together(
    run: Run, ranks: int, *, resume: bool = False, stop_when: Callable[[], bool] | None = None, code: int = 0
) -> Run:
    """By torchrun, as the launcher does. Raises AssertionError with what the processes printed, unless they end with `code`.

    `stop_when`: once it holds, torchrun gets a SIGTERM, which it hands on.
    """
    torchrun = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    script = [str(Path(__file__).with_name("train_rank.py")), str(run.path), *(["resume"] if resume else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "2000"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen([*torchrun, str(ranks), *script], text=True, env=environment, **pipes)  # type: ignore[call-overload]
    try:
        until = time.monotonic() + LIMIT_S
        while stop_when is not None and process.poll() is None and not stop_when() and time.monotonic() < until:
            time.sleep(0.02)
        if stop_when is not None:
            process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate(timeout=LIMIT_S)
    finally:
        process.kill()
    assert process.returncode == code, printed[-9000:]
    return run


def resumable_at(run: Run, step: int, folder: Path) -> Run:
    """A copy of a run as it was when it had no later checkpoint than `step`'s."""
    shutil.copytree(run.path, folder)
    shutil.rmtree(folder / "model")
    for checkpoint in (folder / "checkpoints").glob("step-*"):
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    (folder / "checkpoints" / "index.json").unlink()  # made again from what is there
    (folder / "events.jsonl").unlink()
    return Run.open(folder)


def events(run: Run) -> list[dict[str, Any]]:
    """Those that are whole."""
    content = run.events.read_text() if run.events.exists() else ""
    return [json.loads(line) for line in content.splitlines(keepends=True) if line.endswith("\n")]


def metrics(run: Run) -> list[dict[str, float]]:
    """What each step and evaluation measured, without what a clock measured."""
    return [
        {"step": e["step"], **{k: v for k, v in e["values"].items() if not any(word in k for word in CLOCKED)}}
        for e in events(run)
        if e["kind"] == "metrics"
    ]


def weights(run: Run) -> dict[str, Tensor]:
    (file,) = (file for file in run.model.glob("*model.safetensors"))
    return load_file(file)


def assert_same_weights(got: dict[str, Tensor], wanted: dict[str, Tensor], *, within: float) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert float((got[name] - value).abs().max()) <= within, name
        assert got[name].dtype == value.dtype
    assert any(bool(torch.any(value != 0)) for value in wanted.values())
