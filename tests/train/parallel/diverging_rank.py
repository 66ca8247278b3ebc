"""As `train_rank.py`, with a row of no numbers: `torchrun ... diverging_rank.py RUN (loss | gradients) TOKEN...`. What holds
these tokens, one behind the other, has a loss, or gradients, that are none."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from tunedock.data.layout import Row
from tunedock.events import Emitter
from tunedock.model.policy import Policy
from tunedock.recipe.schema import Recipe
from tunedock.run.ranks import Rank
from tunedock.run.record import Run
from tunedock.run.stop import StopRequest
from tunedock.train.stage import train

computed = Policy.logprobs


def poison(what: str, tokens: list[int]) -> None:
    def logprobs(self: Policy, row: Row) -> Any:
        logprob_N, tensors = computed(self, row)
        here = row.input_ids_BT.reshape(-1).tolist()
        if not any(here[at : at + len(tokens)] == tokens for at in range(len(here))):
            return logprob_N, tensors
        if what == "loss":
            return logprob_N * float("nan"), tensors
        if logprob_N.requires_grad:
            logprob_N.register_hook(lambda gradient: gradient * float("inf"))
        return logprob_N, tensors

    Policy.logprobs = logprobs  # type: ignore[method-assign]


if __name__ == "__main__":
    torch.set_num_threads(1)
    run = Run.open(Path(sys.argv[1]))
    poison(sys.argv[2], [int(token) for token in sys.argv[3:]])
    emit = Emitter.to_file(run.events) if Rank.of(os.environ).leads else Emitter(None)
    train(run, Recipe.model_validate(run.resolved()["recipe"]), emit, resume=False, stop=StopRequest())
    sys.stdout.flush()
    os._exit(0)  # as in `train_rank.py`
