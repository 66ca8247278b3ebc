"""Real runs against real limits: control groups in which a run does not fit as planned. The whole way, by the pipeline."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from families import save_tiny
from memory_group import memory_group, run_in
from tunedock.plan.rungs import MOST_TOKENS

pytestmark = pytest.mark.long
MIB = 1 << 20
TRAIN = Path(__file__).with_name("train_in_group.py")


def recipe(folder: Path, *, tokens: int, budget: str, rows: int = 40, max_steps: int = 6) -> Path:
    shape = {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "head_dim": 64,
    }
    save_tiny("qwen3", folder / "base", **shape)
    lines = [json.dumps({"text": f"{n} " + "the order arrived late " * (tokens // 4)}) for n in range(rows)]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "recipe.yaml").write_text(
        "model: ./base\nobjective: pretrain\n"
        "data: {train: rows.jsonl, split: {train: 1, validation: 0, test: 0}, max_length: 2048}\n"
        f"train: {{max_steps: {max_steps}, batch_size: 8, save_steps: 1, bf16: false, {budget}"
        "report_to: none, output_dir: ./run}\n"
    )
    return folder / "recipe.yaml"


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run/events.jsonl").read_text().splitlines()]


def steps(folder: Path) -> list[int]:
    return [event["step"] for event in events(folder) if event["kind"] == "metrics" and "loss" in event["values"]]


def budgets(folder: Path) -> list[tuple[int, int]]:
    return [
        (event["data"]["step"], event["data"]["token_budget"])
        for event in events(folder)
        if event["kind"] == "note" and "why" in event["data"]
    ]


def test_a_row_too_large_for_the_group_is_made_smaller_before_the_kernel_looks(tmp_path: Path) -> None:
    made = recipe(tmp_path, tokens=400, budget="token_budget: 8192, ")
    with memory_group(1000 * MIB) as group:
        done = run_in(group, [str(TRAIN), str(made)], cwd=tmp_path, timeout_s=280)
        kills = group.oom_kills
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert kills == 0
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    lowered = budgets(tmp_path)
    assert lowered and lowered[0][0] == 1 and lowered[0][1] <= 4096


def test_the_budget_is_planned_by_the_group_and_not_by_the_host(tmp_path: Path) -> None:
    made = recipe(tmp_path, tokens=100, budget="")
    with memory_group(600 * MIB) as group:
        done = run_in(group, [str(TRAIN), str(made)], cwd=tmp_path, timeout_s=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    record = json.loads((tmp_path / "run/budget.json").read_text())
    assert record[0]["tokens"] < MOST_TOKENS["cpu"], record
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's killer is Linux's")
def test_a_worker_the_kernel_kills_in_the_middle_is_resumed(tmp_path: Path) -> None:
    """The launcher takes what is free after step 3, and tells the kernel whom to kill."""
    made = recipe(tmp_path, tokens=100, budget="token_budget: 1024, ", max_steps=40)
    with memory_group(2500 * MIB) as group:
        done = run_in(group, [str(TRAIN), str(made), "--hungry-after", "3"], cwd=tmp_path, timeout_s=280)
        kills = group.oom_kills
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert kills >= 1
    told = events(tmp_path)
    (warning,) = [event for event in told if event["kind"] == "warning" and "killed" in event["message"]]
    assert "at most 512 tokens" in warning["message"]
    resumed = next(event["data"]["step"] for event in told if event.get("message", "").startswith("resumed at step"))
    assert resumed >= 2
    assert budgets(tmp_path) == [(resumed + 1, 512)]
    assert sorted(set(steps(tmp_path))) == list(range(1, 41))
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "finished"
