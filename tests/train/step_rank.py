"""One of two ranks: `torchrun ... step_rank.py FOLDER` writes what a step's gradients come to there when memory runs out on rank 1
between two rows, and when rank 0 is asked to stop."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from families import tiny_model
from tiny_loop import CPU, data
from tunedock.data.layout import Row, padded
from tunedock.model import world
from tunedock.model.adapter import attach
from tunedock.model.policy import Policy, Precision
from tunedock.objective.evaluate import StepSums
from tunedock.objective.likelihood import Sft
from tunedock.recipe.adapters import Lora
from tunedock.recipe.schema import Train
from tunedock.run.pulse import Pulse
from tunedock.train.budget import Budget, Shortage
from tunedock.train.memory import CudaMemory, HostMemory
from tunedock.train.optimizer import make_updater
from tunedock.train.step import Gradients, Stopped

SAMPLES, ROW = data()[:7], 24


class FullForOnce(Policy):
    """Its memory runs out in the middle of its second row, as another process on the device may bring about."""

    full = True

    def logprobs(self, row: Row) -> Any:
        found = super().logprobs(row)
        self.rows_seen = getattr(self, "rows_seen", 0) + 1
        if self.full and self.rows_seen == 2:
            self.full = False
            raise torch.OutOfMemoryError("CUDA out of memory")
        return found


class NotAhead(HostMemory):
    """A host's memory that is not looked at before a row, as a CUDA device's is not."""

    looks_ahead = CudaMemory.looks_ahead


def main(folder: Path) -> None:
    said: dict[str, Any] = {}
    asked = [False]
    with world.joined(timeout_s=30) as own:
        kind = FullForOnce if own.number else Policy
        policy = kind(
            attach(tiny_model("qwen3"), Lora(r=4, alpha=8), seed=3), CPU, Precision(torch.float32, torch.float32)
        )
        updater = make_updater(
            policy.trainable, Train(learning_rate=1e-3), total_steps=1, device=CPU, model=policy.model
        )
        budget = Budget(memory=NotAhead(), plan=None, most=4096, pinned=64)
        gradients = Gradients(policy, Sft(), None, updater, budget, lambda: asked[0], padded, Pulse())

        def accumulated() -> StepSums | Shortage:
            return gradients.accumulate(SAMPLES, padded(SAMPLES, budget_tokens=ROW), 1.0)

        said["short"] = isinstance(short := accumulated(), Shortage)
        said["elsewhere"] = isinstance(short, Shortage) and short.elsewhere
        said["agreed"] = world.agree(not isinstance(short, StepSums))
        updater.drop()
        again = accumulated()
        said["loss"] = again.over_ranks().loss if isinstance(again, StepSums) else None
        asked[0] = own.leads
        try:
            accumulated()
        except Stopped:
            said["stopped"] = True
        said["in step"] = world.told_by_all(own.number)
    (folder / f"{own.number}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
