"""Our side: `tunedock train RECIPE`, the command a user gives, read through the run's `events.jsonl`.

Memory is that of the command and of its worker together; what their imports take is measured in two processes that import the
same and nothing more.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.imports import OUR_COMMAND, OUR_WORKER, resident_after
from benchmarks.memory import PeakMemory
from benchmarks.protocol import Job, Measured, Step, answer, answer_channel, receive
from benchmarks.sides import variant_of

PACKAGES = ("tunedock", "torch", "transformers", "peft", "accelerate")


def recipe_of(job: Job, run: Path) -> dict[str, Any]:
    return {
        "model": job.model,
        "objective": job.objective,
        "adapter": {"kind": "lora", "r": job.lora_r, "alpha": job.lora_alpha, "dropout": 0.0},
        "data": {
            "train": [{"path": str(Path(job.data) / "tunedock.jsonl")}],
            "split": {"train": 1.0, "validation": 0.0, "test": 0.0},
            "max_length": job.max_length,
            "cache_dir": str(Path(job.work) / "cache"),
        },
        "train": {
            "output_dir": str(run),
            "num_train_epochs": 1.0,
            "max_steps": job.limit_steps or -1,
            "batch_size": job.batch_size,
            "learning_rate": job.learning_rate,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "eval_strategy": "no",
            "save_strategy": "no",
            "report_to": "none",
            "seed": job.seed,
        },
        "offline": True,
        **variant_of(job).settings,
    }


@dataclass(frozen=True, slots=True)
class Told:
    """What the run's events say."""

    steps: tuple[Step, ...]
    first_step_at: float
    preprocessing_s: float
    computed_tokens: tuple[int, ...]
    """Of each step, a shared prefix counted once."""
    first_figures: dict[str, float]


def read_events(lines: list[str], tokens: list[int], trained: list[int]) -> Told:
    """Steps from metrics events; `tokens` and `trained` of each step are the data's. Raises ValueError when steps are missing."""
    events = [json.loads(line) for line in lines]
    metrics = [event for event in events if event["kind"] == "metrics" and "loss" in event["values"]]
    if len(metrics) != len(tokens):
        raise ValueError(f"{len(metrics)} steps in the events, {len(tokens)} expected")
    began = next(event["time"] for event in events if event.get("task") == "training")
    ends = [event["time"] for event in metrics]
    totals = [int(event["values"]["tokens"]) for event in metrics]
    return Told(
        steps=tuple(
            Step(end - start, count, carrying, float(event["values"]["loss"]))
            for start, end, count, carrying, event in zip([began, *ends], ends, tokens, trained, metrics, strict=False)
        ),
        first_step_at=ends[0],
        preprocessing_s=_preparing(events),
        computed_tokens=tuple(after - before for before, after in zip([0, *totals], totals, strict=False)),
        first_figures={name: value for name, value in metrics[0]["values"].items() if value is not None},
    )


def _preparing(events: list[dict[str, Any]]) -> float:
    """From the first row read to the note that accounts for the rows."""
    account = next(event["time"] for event in events if event["kind"] == "note" and "data:" in event["message"])
    reading = (event["time"] for event in events if event["kind"] == "progress" and event["task"] != "training")
    return float(account - next(reading, account))


def per_step(values: list[int], batch_size: int) -> list[int]:
    return [sum(values[at : at + batch_size]) for at in range(0, len(values), batch_size)]


def main() -> None:
    channel = answer_channel()
    job = receive()
    facts = json.loads((Path(job.data) / "facts.json").read_text(encoding="utf-8"))
    work = Path(job.work)
    run, recipe = work / "run", work / "recipe.yaml"
    recipe.write_text(json.dumps(recipe_of(job, run)), encoding="utf-8")  # JSON is YAML
    started = time.time()
    process = subprocess.Popen([sys.executable, "-m", "tunedock", "train", str(recipe)], cwd=work)
    with PeakMemory(process.pid) as memory:
        code = process.wait()
    if code:
        raise SystemExit(code)
    told = read_events(
        (run / "events.jsonl").read_text(encoding="utf-8").splitlines(),
        per_step(facts["tokens"], job.batch_size)[: job.limit_steps],
        per_step(facts["trained"], job.batch_size)[: job.limit_steps],
    )
    measured = Measured(
        side=job.side,
        variant=job.variant,
        objective=job.objective,
        model_name=job.model_name,
        steps=told.steps,
        first_step_s=told.first_step_at - started,
        preprocessing_s=told.preprocessing_s,
        rows=len(facts["tokens"]),
        reference_s=0.0,
        peak_bytes=memory.peak_bytes,
        imports_bytes=resident_after(OUR_COMMAND) + resident_after(OUR_WORKER),
        same_order=True,
        versions={package: importlib.metadata.version(package) for package in PACKAGES},
        first_figures=told.first_figures,
        settings={"computed_tokens": list(told.computed_tokens)},
    )
    answer(channel, measured)


if __name__ == "__main__":
    main()
