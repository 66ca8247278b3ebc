"""The one loop: samples -> rows -> log-probabilities -> objective -> update -> event. It knows no objective and no layout.

A step's loss is a sum over rows, divided once by the step's count: gradient accumulation is only how many rows there are. A
request to stop takes effect between rows: the half-done step is thrown away, the state before it is saved, and resuming does it
again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tunedock.data.layout import Row
from tunedock.data.sample import Sample
from tunedock.errors import DivergedError, InterruptedRun
from tunedock.events import Emitter
from tunedock.model.adapter import load_trainable_state, trainable_state
from tunedock.model.policy import Policy
from tunedock.objective.base import Objective
from tunedock.objective.evaluate import mean_loss, step_terms
from tunedock.recipe.schema import Train
from tunedock.train.checkpoint import (
    Checkpoints,
    Snapshot,
    optimizer_state,
    random_states,
    restore_optimizer,
    restore_random_states,
)
from tunedock.train.feed import Feed
from tunedock.train.machine import usage
from tunedock.train.optimizer import Updater

Layout = Callable[[Sequence[Sample]], list[Row]]


@dataclass(frozen=True, slots=True)
class Course:
    """How far the loop goes."""

    total_steps: int
    steps_per_epoch: int | None
    """None for a stream, which has no epochs."""
    examples: int
    """Samples seen by the end, each time anew."""

    def epoch(self, step: int) -> float:
        return step / self.steps_per_epoch if self.steps_per_epoch else 0.0


@dataclass(slots=True)
class Progress:
    """What the loop carries from step to step, and a checkpoint keeps."""

    step: int = 0
    tokens: int = 0
    trained_tokens: float = 0.0
    best: float | None = None
    stale: int = 0
    """Evaluations since one that was better by `early_stopping_threshold`."""
    last_eval: float | None = None
    skipped: int = 0
    """Steps left out because float16 gradients overflowed."""


@dataclass(slots=True)
class _Window:
    """Sums since the last metrics event."""

    loss: float = 0.0
    count: float = 0.0
    tokens: int = 0
    steps: int = 0
    grad_norm: float = 0.0
    metrics: dict[str, list[float]] = field(default_factory=dict)
    since: float = field(default_factory=time.perf_counter)


class _Stop(Exception):  # noqa: N818 - a way out of the rows of a step, not an error
    pass


class Loop:
    def __init__(
        self,
        *,
        policy: Policy,
        objective: Objective,
        feed: Feed,
        validation: Sequence[Sample],
        layout: Layout,
        updater: Updater,
        checkpoints: Checkpoints,
        course: Course,
        train: Train,
        emit: Emitter,
        stop_requested: Callable[[], bool],
    ) -> None:
        self._policy = policy
        self._objective = objective
        self._feed = feed
        self._validation = validation
        self._layout = layout
        self._updater = updater
        self._checkpoints = checkpoints
        self._course = course
        self._train = train
        self._emit = emit
        self._stop_requested = stop_requested
        self._window = _Window()
        self.progress = Progress()

    # -- the loop ------------------------------------------------------------------------------------------------------

    def run(self) -> Progress:
        """Runs to the end of the course. Raises InterruptedRun, its state saved, when asked to stop; DivergedError on a loss
        that is no number."""
        self._emit.progress("training", self.progress.step, self._course.total_steps, "steps")
        self._window = _Window()
        while self.progress.step < self._course.total_steps and not self._out_of_patience():
            before = random_states()
            try:
                self._step()
            except _Stop:
                self._updater.optimizer.zero_grad(set_to_none=True)
                restore_random_states(before)
                self._interrupted()
            self._log()
            if self._due(self._train.eval_strategy, self._train.eval_steps or self._train.save_steps):
                self._evaluate()
            if self._due(self._train.save_strategy, self._train.save_steps):
                self.save()
            self._emit.progress("training", self.progress.step, self._course.total_steps, "steps")
        if self._out_of_patience():
            self._emit.note(
                f"early stopping: {self.progress.stale} evaluations without improvement; the best is {self.progress.best}",
                step=self.progress.step,
            )
        if self._train.save_strategy != "no":
            self.save()
        return self.progress

    def _step(self) -> None:
        samples = self._feed.step(self.progress.step)
        rows = self._layout(samples)
        count = self._objective.count(samples)
        self._policy.model.train()
        loss = 0.0
        for terms in step_terms(self._policy, self._objective, samples, rows):
            if self._stop_requested():
                raise _Stop
            share = terms.loss / count
            self._updater.backward(share)
            loss += float(share.detach())
            for name, (total, of) in terms.metrics.items():
                sums = self._window.metrics.setdefault(name, [0.0, 0.0])
                sums[0] += float(total.detach())
                sums[1] += of
        if not math.isfinite(loss):
            self._diverged("loss", loss, samples)
        norm = self._updater.clip()
        if not math.isfinite(norm) and not self._updater.scaler.is_enabled():
            self._diverged("norm of the gradients", norm, samples)
        taken = self._updater.update()
        tokens = sum(row.tokens for row in rows)
        self.progress.step += 1
        self.progress.tokens += tokens
        self.progress.trained_tokens += count
        self.progress.skipped += not taken
        window = self._window
        window.loss += loss * count
        window.count += count
        window.tokens += tokens
        window.steps += 1
        window.grad_norm = norm

    def _due(self, strategy: str, every: int) -> bool:
        step = self.progress.step
        if strategy == "steps":
            return step % every == 0
        per_epoch = self._course.steps_per_epoch
        last = step == self._course.total_steps
        return strategy == "epoch" and (last or (per_epoch is not None and step % per_epoch == 0))

    def _out_of_patience(self) -> bool:
        patience = self._train.early_stopping_patience
        return patience is not None and self.progress.stale >= patience

    # -- what it says --------------------------------------------------------------------------------------------------

    def _log(self) -> None:
        window = self._window
        if window.steps < self._train.logging_steps and self.progress.step < self._course.total_steps:
            return
        seconds = time.perf_counter() - window.since
        values = {
            "loss": window.loss / window.count,
            "learning_rate": self._updater.learning_rate,
            "grad_norm": window.grad_norm,
            "tokens_per_second": window.tokens / max(seconds, 1e-9),
            "tokens": float(self.progress.tokens),
            **{name: total / max(of, 1e-12) for name, (total, of) in window.metrics.items()},
            **usage(),
        }
        self._emit.metrics(self.progress.step, self._course.epoch(self.progress.step), values)
        self._window = _Window()

    def _evaluate(self) -> None:
        if not len(self._validation):
            return
        started = time.perf_counter()
        self._policy.model.eval()
        loss, count = mean_loss(
            self._policy,
            self._objective,
            self._validation,
            self._layout,
            on_progress=lambda done: self._emit.progress("validation", done, len(self._validation), "samples"),
        )
        self._updater.plateau(loss)
        values = {"eval_loss": loss, "eval_tokens": count, "eval_seconds": time.perf_counter() - started}
        self._emit.metrics(self.progress.step, self._course.epoch(self.progress.step), values)
        self.progress.last_eval = loss
        before = self.progress.best
        better = math.isfinite(loss) and (before is None or loss < before)
        enough = better and (before is None or loss < before - self._train.early_stopping_threshold)
        self.progress.stale = 0 if enough else self.progress.stale + 1
        if better:
            self.progress.best = loss
            if self._train.save_strategy != "no":
                self.save(metric=loss, better=True)
        self._window.since = time.perf_counter()

    def _diverged(self, what: str, value: float, samples: Sequence[Sample]) -> None:
        index = self._checkpoints.index()
        kept = f"the last checkpoint is {index.last}" if index.last else "there is no checkpoint yet"
        rows = ", ".join(sample.row_id for sample in samples[:5])
        raise DivergedError(
            f"the {what} is {value} at step {self.progress.step + 1}; {kept}",
            where=f"rows {rows}{' ...' if len(samples) > 5 else ''}",
            hint="lower train.learning_rate, lengthen train.warmup_steps, or look at these rows with `tunedock data show`",
        )

    def _interrupted(self) -> None:
        if self._train.save_strategy != "no":
            self.save()
            raise InterruptedRun(f"stopped after step {self.progress.step}; a checkpoint is saved")
        raise InterruptedRun(
            f"stopped after step {self.progress.step}; `train.save_strategy: no` keeps nothing to resume",
            hint="`--resume` begins this run anew; with `train.save_strategy: steps` a run can be stopped and gone on with",
        )

    # -- state ---------------------------------------------------------------------------------------------------------

    def save(self, *, metric: float | None = None, better: bool = False) -> None:
        self._checkpoints.save(self._snapshot(), metric=metric, better=better)

    def _snapshot(self) -> Snapshot:
        tensors, numbers = optimizer_state(self._updater.optimizer)
        progress = {name: getattr(self.progress, name) for name in Progress.__slots__}
        return Snapshot(
            step=self.progress.step,
            trained=trainable_state(self._policy.model),
            optimizer_tensors=tensors,
            state={
                "progress": progress,
                "optimizer": numbers,
                "schedule": _plain_schedule(self._updater.schedule.state_dict()),
                "scaler": self._updater.scaler.state_dict(),
                "feed": self._feed.state(self.progress.step),
            },
            random=random_states(),
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Goes on exactly where the snapshot was taken."""
        load_trainable_state(self._policy.model, snapshot.trained)
        state = snapshot.state
        restore_optimizer(self._updater.optimizer, snapshot.optimizer_tensors, state["optimizer"])
        self._updater.schedule.load_state_dict(state["schedule"])
        self._updater.scaler.load_state_dict(state["scaler"])
        self._feed.restore(state["feed"])
        self.progress = Progress(**state["progress"])
        restore_random_states(snapshot.random)


def _plain_schedule(state: Mapping[str, Any]) -> dict[str, Any]:
    """A schedule's numbers; its functions are made again from the recipe."""
    return {name: value for name, value in state.items() if isinstance(value, int | float | str | list | dict | None)}
