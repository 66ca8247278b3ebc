"""One of several ranks that train together: `torchrun ... train_rank.py RUN [resume]`, as `tunedock.worker train RUN` is one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from tunedock.events import Emitter
from tunedock.recipe.schema import Recipe
from tunedock.run.ranks import Rank
from tunedock.run.record import Run
from tunedock.run.stop import StopRequest
from tunedock.train.stage import train

if __name__ == "__main__":
    torch.set_num_threads(1)
    run = Run.open(Path(sys.argv[1]))
    emit = Emitter.to_file(run.events) if Rank.of(os.environ).leads else Emitter(None)
    stop = StopRequest()
    stop.listen()
    train(run, Recipe.model_validate(run.resolved()["recipe"]), emit, resume="resume" in sys.argv, stop=stop)
    sys.stdout.flush()
    os._exit(0)  # threads of DeepSpeed's may still run when the interpreter takes itself apart, which then aborts
