"""What checkpoints cost a training: `python -m benchmarks.checkpoints [--pairs 5] [--steps 50] [--model tiny]`.

The same run, a fork of this process each time, turn about in three ways: without checkpoints, with one every 20 steps written
beside training, and with the same written while training waits (as where a copy of the state does not fit into memory). Whole
weights, so that a checkpoint is twelve bytes a parameter: an adapter's is a hundredth of that. Seconds are those between the events
of the first step and the last, so start-up is not among them; the last save, which nothing runs beside, is neither. What a save
costs is the difference of the medians by the number of saves; what that is at the default interval follows by arithmetic.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from tunedock.launch.local import SPIN_COUNT

os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)  # as a worker has it; before torch

from benchmarks.chaos.life import begin, import_all, told
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


def seconds(folder: Path, model: Path, way: str, steps: int) -> float:
    """From the end of the first step to the end of the last."""
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
    if begin(run, resume=False, first=partial(_as_a_worker, way)).wait(1200) != 0:
        raise RuntimeError(f"the run failed; see {run.log('train')}")
    times = [event["time"] for event in told(run) if event["kind"] == "metrics" and "loss" in event["values"]]
    size = sum(path.stat().st_size for path in run.checkpoints.glob(f"step-{steps:08d}/*"))
    shutil.rmtree(run.path)
    if way != "no":
        print(f"  a checkpoint of {size / 1e6:.0f} MB", flush=True)
    return float(times[-1] - times[0])


def _as_a_worker(way: str) -> None:
    import torch

    from tunedock.train import checkpoint_writer

    torch.set_num_threads(os.cpu_count() or 1)
    if way == "waiting":
        checkpoint_writer.COPY_MARGIN = float("inf")


def summary(taken: dict[str, list[float]], steps: int) -> dict[str, Any]:
    """Medians, and shares of the time without checkpoints."""
    saves = (steps - 1) // EVERY
    medians = {way: statistics.median(values) for way, values in taken.items()}
    step_s = medians["no"] / (steps - 1)

    def over(way: str) -> float:
        return statistics.median(a - b for a, b in zip(taken[way], taken["no"], strict=True))

    share: Callable[[str, int], float] = lambda way, every: over(way) / saves / (every * step_s)  # noqa: E731
    return {
        "step_s": step_s,
        "saves": saves,
        **{f"{way}_s": medians[way] for way in WAYS},
        **{f"{way}_save_costs_s": over(way) / saves for way in WAYS[1:]},
        **{f"{way}_every_{every}": share(way, every) for way in WAYS[1:] for every in (EVERY, DEFAULT_INTERVAL)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--model", default="tiny")
    arguments = parser.parse_args()
    model = _model(arguments.model)
    import_all()
    folder = Path(tempfile.mkdtemp(prefix="checkpoints-"))
    taken: dict[str, list[float]] = {way: [] for way in WAYS}
    for pair in range(arguments.pairs):
        for way in WAYS if pair % 2 == 0 else WAYS[::-1]:
            taken[way].append(seconds(folder, model, way, arguments.steps))
            print(f"{way}: {taken[way][-1]:.2f} s", flush=True)
    shutil.rmtree(folder)
    found = summary(taken, arguments.steps)
    print(json.dumps(found, indent=1))
    from benchmarks.results import this_machine

    machine = this_machine()
    value = {"machine": asdict(machine), "options": vars(arguments), "seconds": taken, **found}
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
