"""A short training of the demo's model by `tunedock train`, and its losses: what tests of lost processes and machines share."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from tunedock.events import EventReader
from tunedock.run.record import Run

ROOT = Path(__file__).parents[1]
STEPS = 30


def command(folder: Path, *overrides: str) -> list[str]:
    """In float32, so that losses differ by rounding alone; a checkpoint every five steps."""
    return [
        sys.executable, "-m", "tunedock", "train", str(ROOT / "recipes" / "sft-lora.yaml"), f"train.max_steps={STEPS}",
        "train.save_steps=5", "train.eval_strategy=no", "train.bf16=false", "train.report_to=none", "data.train.0.num_samples=200",
        f"train.output_dir={folder / 'run'}", f"data.cache_dir={folder / 'cache'}", *overrides,
    ]  # fmt: skip


def losses_alone(folder: Path) -> dict[int, float]:
    """Those of one process."""
    line = command(folder, "launch.processes=1")
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return losses(Run(folder / "run"))


def losses(run: Run) -> dict[int, float]:
    """By step; of steps done again, the last."""
    found: dict[int, float] = {}
    for event in EventReader(run.events).new():
        values: dict[str, Any] = event.get("values", {})
        if "loss" in values:
            found[event["step"]] = float(values["loss"])
    return found


def assert_the_same(run: Run, alone: dict[int, float]) -> None:
    found = losses(run)
    assert sorted(found) == sorted(alone) == list(range(1, STEPS + 1))
    assert max(abs(found[step] - alone[step]) for step in alone) < 1e-3
    assert run.state().status == "finished"
