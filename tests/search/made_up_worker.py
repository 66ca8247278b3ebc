"""Stands in for a training: a worker that speaks the protocol and whose validation loss is a formula of the recipe.

    python made_up_worker.py [STEP_SECONDS] train RUN_DIR

The loss is best at a learning rate of 1e-3 and a rank of 16; above 0.05 the training diverges. SIGTERM and SIGINT end it as they
end a real one: saved, interrupted, gone on with by `resume`.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from tunedock.errors import DivergedError, InterruptedRun, TunedockError
from tunedock.events import Emitter
from tunedock.run.record import Run

STEPS = 4


def main(pause_s: float, run: Run) -> int:
    request = json.loads(sys.stdin.readline())
    emit = Emitter.to_file(run.events)
    recipe = run.resolved()["recipe"]
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask)
    done = run.path / "checkpoints" / "done"
    step = int(done.read_text()) if request["resume"] and done.is_file() else 0
    rate, rank = recipe["train"]["learning_rate"], recipe["adapter"]["r"]
    with run.working("train"):
        try:
            while step < STEPS:
                for _ in range(10):
                    time.sleep(pause_s / 10)
                    if asked:
                        raise InterruptedRun(f"stopped after step {step}")
                if rate > 0.05:
                    raise DivergedError("the loss is nan at step 1")
                step += 1
                loss = 1.0 + (math.log10(rate) + 3) ** 2 + abs(math.log2(rank / 16)) / 10 + 1 / step
                emit.metrics(step, float(step), {"eval_loss": loss, "eval_tokens": 5.0})
                done.write_text(str(step))
            run.model.mkdir()
        except TunedockError as error:
            status = "interrupted" if isinstance(error, InterruptedRun) else "failed"
            run.update(status=status, exit_code=error.exit_code)
            emit.emit("failure", error=error.to_json())
            return error.exit_code
        run.update(status="finished", exit_code=0)
    emit.result({"steps": step, "eval_loss": loss})
    return 0


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), Run.open(Path(sys.argv[3]))))
