"""What is measured inside a process that trains with `transformers.Trainer` or a class made from it: TRL, LLaMA-Factory, plain.

Steps are counted where all three pass through: `Trainer.training_step` for tokens, callbacks for times and losses.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback

from benchmarks.memory import PeakMemory, resident_bytes
from benchmarks.protocol import Job, Measured, Step, answer, answer_channel, receive
from benchmarks.sides import Variant, variant_of

PACKAGES = ("torch", "transformers", "peft", "trl", "llamafactory", "accelerate", "datasets")
NO_LOSS = -100


class Recorder(TrainerCallback):  # type: ignore[misc]
    """Times, tokens and losses of a training."""

    def __init__(self, job: Job, pad_id: int, imports_bytes: int) -> None:
        self.job = job
        self.preprocessing_s = 0.0
        self.reference_s = 0.0
        self._pad_id = pad_id
        self._imports_bytes = imports_bytes
        self._ends: list[float] = []
        self._tokens: list[int] = []
        self._trained: list[int] = []
        self._losses: dict[int, float] = {}
        self._first_figures: dict[str, float] = {}
        self._started = 0.0
        self._first_step_s = 0.0
        self._now = [0, 0]
        self._count_steps()

    def _count_steps(self) -> None:
        whole = Trainer.training_step

        def counted(trainer: Any, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
            self._now[0] += int((inputs["input_ids"] != self._pad_id).sum())
            self._now[1] += _trained_tokens(inputs)
            return whole(trainer, model, inputs, *rest, **named)

        Trainer.training_step = counted

    @contextmanager
    def preprocessing(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.preprocessing_s += time.perf_counter() - started

    def timed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The function, its time added to `preprocessing_s` or `reference_s`."""

        def run(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                setattr(self, name, getattr(self, name) + time.perf_counter() - started)

        return run

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self._ends:
            self._first_step_s = time.time() - self.job.spawned_at
        self._ends.append(time.perf_counter())
        self._tokens.append(self._now[0])
        self._trained.append(self._now[1])
        self._now = [0, 0]

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self._losses[state.global_step] = float(logs["loss"])
            if state.global_step == 1:
                self._first_figures = {name: float(value) for name, value in logs.items() if _is_number(value)}

    def measured(self, peak_bytes: int, variant: Variant, *, rows: int) -> Measured:
        starts = [self._started, *self._ends]
        return Measured(
            side=self.job.side,
            variant=self.job.variant,
            objective=self.job.objective,
            model_name=self.job.model_name,
            steps=tuple(
                Step(end - start, tokens, trained, self._losses[number])
                for number, (start, end, tokens, trained) in enumerate(
                    zip(starts, self._ends, self._tokens, self._trained, strict=False), 1
                )
            ),
            first_step_s=self._first_step_s,
            preprocessing_s=self.preprocessing_s,
            rows=rows,
            reference_s=self.reference_s,
            peak_bytes=peak_bytes,
            imports_bytes=self._imports_bytes,
            same_order=variant.same_order,
            first_figures=self._first_figures,
            versions=versions(),
            settings=dict(variant.settings),
        )


def _trained_tokens(inputs: Any) -> int:
    if "completion_mask" in inputs:  # TRL's preference pairs
        return int(inputs["completion_mask"].sum())
    labels = inputs.get("labels")
    return 0 if labels is None else int((labels[..., 1:] != NO_LOSS).sum())


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def drive(train: Callable[[Job, Recorder], None]) -> None:
    """Reads the job, trains, answers."""
    imports_bytes = resident_bytes()
    channel = answer_channel()
    job = receive()
    variant = variant_of(job)
    facts = json.loads((Path(job.data) / "facts.json").read_text(encoding="utf-8"))
    with PeakMemory(os.getpid()) as memory:
        recorder = Recorder(job, facts["pad_id"], imports_bytes)
        train(job, recorder)
    answer(channel, recorder.measured(memory.peak_bytes, variant, rows=len(facts["tokens"])))
