"""What checkpoints cost a training: `python -m benchmarks.checkpoints [--pairs 5] [--steps 50] [--model tiny]`.

With `--parts`, only the two parts of one save: the copy, for which training waits, and the writing beside it.

The same run, a fork of this process each time, turn about in three ways: without checkpoints, with one every 20 steps written
beside training, and with the same written while training waits (as where a copy of the state does not fit into memory). Whole
weights, so that a checkpoint is twelve bytes a parameter: an adapter's is a hundredth of that. Seconds are those between the events
of the first step and the last, so start-up is not among them; the last save, which nothing runs beside, is neither. What a save
costs is the median of the pairs' differences by the number of saves; what that is at the default interval follows by arithmetic.
On a machine that others use too, the processor's seconds say more than the clock's.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from tunedock.launch.process import SPIN_COUNT

os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)  # as a worker has it; before torch

from benchmarks.chaos.life import Steps, begin, import_all, told
from benchmarks.chaos.project import DEMO
from benchmarks.results import RESULTS

EVERY = 20
DEFAULT_INTERVAL = 500
WAYS = ("no", "beside", "waiting")

RECIPE = """\
model: {model}
offline: true
adapter: full
data: {{train: [{{path: {rows}}}], max_length: 512, cache_dir: {cache}, split: {{train: 1, validation: 0, test: 0}}}}
train: {{max_steps: {steps}, batch_size: 4, token_budget: 1024, save_strategy: '{strategy}', save_steps: {every}, report_to: none,
  output_dir: {run}}}
"""


def seconds(folder: Path, model: Path, way: str, steps: int) -> tuple[float, float]:
    """From the end of the first step to the end of the last: by the clock, and of the processor, all threads together."""
    from tunedock.pipeline.stages import create_run, resolve_recipe

    recipe = folder / "recipe.yaml"
    strategy = "no" if way == "no" else "steps"
    recipe.write_text(
        RECIPE.format(
            model=model,
            rows=DEMO / "triage.jsonl",
            cache=folder / "cache",
            steps=steps,
            strategy=strategy,
            every=EVERY,
            run=folder / way,
        ),
        encoding="utf-8",
    )
    run = create_run(resolve_recipe([recipe]))
    life = begin(run, resume=False, first=partial(_as_a_worker, way))
    count, process = Steps(run), psutil.Process(life.pid)
    life.until(lambda: count() >= 1)
    before = process.cpu_times()
    life.until(lambda: count() >= steps)
    after = process.cpu_times()
    if life.wait() != 0:
        raise RuntimeError(f"the run failed; see {run.log('train')}")
    times = [event["time"] for event in told(run) if event["kind"] == "metrics" and "loss" in event["values"]]
    size = sum(path.stat().st_size for path in run.checkpoints.glob(f"step-{steps:08d}/*"))
    shutil.rmtree(run.path)
    if size:
        print(f"  a checkpoint of {size / 1e6:.0f} MB", flush=True)
    return float(times[-1] - times[0]), after.user + after.system - before.user - before.system


def _as_a_worker(way: str) -> None:
    import torch

    from tunedock.train import checkpoint_writer

    torch.set_num_threads(os.cpu_count() or 1)
    if way == "waiting":
        checkpoint_writer.COPY_MARGIN = float("inf")


def summary(taken: dict[str, list[float]], steps: int) -> dict[str, Any]:
    """What a save costs: the median over the pairs, in seconds and as shares of the time without checkpoints."""
    saves = (steps - 1) // EVERY
    step_s = statistics.median(taken["no"]) / (steps - 1)
    found: dict[str, Any] = {"step_s": step_s, "saves": saves}
    for way in WAYS[1:]:
        cost = statistics.median(a - b for a, b in zip(taken[way], taken["no"], strict=True)) / saves
        found[way] = {
            "save_costs_s": cost,
            **{f"every_{every}": cost / (every * step_s) for every in (EVERY, DEFAULT_INTERVAL)},
        }
    return found


def parts(times: int = 7) -> dict[str, float]:
    """Seconds of one core for a checkpoint of whole weights of `tiny` with AdamW's moments, the first save left out: its memory is
    new."""
    import torch

    from benchmarks.models import SHAPES
    from tunedock.train.checkpoint import Checkpoints, Snapshot
    from tunedock.train.random_states import random_states

    torch.set_num_threads(1)
    each = SHAPES["tiny"].parameters // 100
    live = {f"{what}{number}": torch.randn(each) for what in ("weight", "first", "second") for number in range(100)}
    folder = Path(tempfile.mkdtemp(prefix="checkpoints-"))
    copies, writes = [], []
    for step in range(times):
        began = time.thread_time()
        held = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in live.items()}
        copied = time.thread_time()
        Checkpoints(folder, keep=1).save(Snapshot(step, held, {}, {"feed": {}}, random_states()))
        copies.append(copied - began)
        writes.append(time.thread_time() - copied)
    shutil.rmtree(folder)
    size = sum(tensor.numel() * tensor.element_size() for tensor in live.values())
    return {"mb": size / 1e6, "copy_s": statistics.median(copies[1:]), "write_s": statistics.median(writes[1:])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--parts", action="store_true")
    arguments = parser.parse_args()
    if arguments.parts:
        print(json.dumps(parts(), indent=1))
        return
    model = _model(arguments.model)
    import_all()
    folder = Path(tempfile.mkdtemp(prefix="checkpoints-"))
    taken: dict[str, dict[str, list[float]]] = {name: {way: [] for way in WAYS} for name in ("clock", "processor")}
    for pair in range(arguments.pairs):
        for way in WAYS if pair % 2 == 0 else WAYS[::-1]:
            clock, processor = seconds(folder, model, way, arguments.steps)
            taken["clock"][way].append(clock)
            taken["processor"][way].append(processor)
            print(f"{way}: {clock:.2f} s, {processor:.2f} s of the processor", flush=True)
    shutil.rmtree(folder)
    found = {name: summary(values, arguments.steps) for name, values in taken.items()}
    print(json.dumps(found, indent=1))
    from benchmarks.results import this_machine

    machine = this_machine()
    value = {"machine": asdict(machine), "options": vars(arguments), "seconds": taken, "summary": found}
    (RESULTS / f"{machine.slug}-checkpoints.json").write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _model(name: str) -> Path:
    """Made by a process of its own: this one must not compute before it forks."""
    pid = os.fork()
    if pid == 0:
        from benchmarks import models

        models.ensure(name)
        os._exit(0)
    os.waitpid(pid, 0)
    from benchmarks import models

    return models.MADE / name


if __name__ == "__main__":
    main()
