"""A worker whose training is a sum over all ranks a step: what goes wrong in it is told by its request.

The worker is the real one, as are torchrun, the process group and its collective calls; only what it trains is put in the place of
training. The request: `steps`, `step_s`, `save_s` (of a stop), and `fault`: {"rank", "step", "how"} with `how` one of raise, kill,
stop, hang, exit.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from tunedock import worker
from tunedock.errors import DataError, InterruptedRun
from tunedock.recipe.launch import Launch


def fail(how: str, step: int) -> None:
    if how == "raise":
        raise DataError(f"a row of step {step} is none", where="rows.jsonl:7")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "hang":
        hangs_here()
    if how == "exit":
        os._exit(3)


def hangs_here() -> None:
    time.sleep(600)


def train(call: worker.Call) -> None:
    launch = Launch.model_validate(call.require_run().resolved()["recipe"]["launch"])
    dist.init_process_group("gloo", timeout=timedelta(seconds=launch.group_timeout_s))
    fault: dict[str, Any] = call.request.get("fault") or {}
    done = Path(call.require_run().path / "done")  # what a checkpoint would say
    first = int(done.read_text()) if call.request.get("resume") and done.is_file() else 0
    total = torch.zeros(())
    with call.stop.deferred():
        for step in range(first, int(call.request.get("steps", 5))):
            call.pulse.at(step, "row")
            if (fault.get("rank"), fault.get("step")) == (call.rank.number, step) and not call.request.get("resume"):
                fail(fault["how"], step)
            asked = torch.tensor(float(call.stop.asked()))
            call.pulse.at(step, "sum of the ranks", waits=True)
            dist.all_reduce(asked)
            if asked:
                if call.rank.leads:
                    done.write_text(str(step))
                    time.sleep(float(call.request.get("save_s", 0.0)))
                    (done.parent / "saved").touch()
                dist.barrier()
                raise call.stop.named(InterruptedRun(f"stopped at step {step}"))
            total += call.rank.number + 1
            dist.all_reduce(total)
            total /= call.rank.world
            if call.rank.leads:
                done.write_text(str(step + 1))
                call.emit.progress("training", step + 1)
            time.sleep(float(call.request.get("step_s", 0.0)))
    call.emit.result(
        {"total": float(total), "first": first, "ranks": call.rank.world, "threads": torch.get_num_threads()}
    )
    dist.destroy_process_group()


worker.STAGES["train"] = train

if __name__ == "__main__":
    code = worker.main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)
