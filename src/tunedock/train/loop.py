"""The one loop: samples -> rows -> log-probabilities -> objective -> update -> event. It knows no objective and no layout.

A step's loss is a sum over rows, divided once by the step's count: gradient accumulation is only how many rows there are. A step
is done whole or not at all, and so is an evaluation. A request to stop takes effect between rows: what is half done is thrown away,
the state before it is saved, and resuming does it again. Where a row does not fit into memory, the step is thrown away likewise and
done in smaller rows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from tunedock.data.layout import Row
from tunedock.data.sample import Sample
from tunedock.errors import EngineError, InterruptedRun, RewardError
from tunedock.events import Emitter
from tunedock.model import world
from tunedock.model.policy import Policy
from tunedock.model.reference import Reference
from tunedock.objective.base import Objective
from tunedock.objective.evaluate import StepSums
from tunedock.recipe.schema import Train
from tunedock.run.pulse import Pulse
from tunedock.train.budget import Budget, Layout
from tunedock.train.checkpoint import Checkpoints, Snapshot
from tunedock.train.checkpoint_writer import CheckpointWriter, spare_bytes
from tunedock.train.divergence import Blame, Divergence, LeftOut
from tunedock.train.evaluation import Evaluation, objective_on, stopping
from tunedock.train.feed import Ahead, Feed
from tunedock.train.grace import Grace
from tunedock.train.machine import usage
from tunedock.train.metric_names import greater_is_better
from tunedock.train.optimizer import Updater
from tunedock.train.parallel.shared import shared
from tunedock.train.random_states import random_states, random_states_of_all, restore_random_states
from tunedock.train.step import Gradients, Stopped

T = TypeVar("T")


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
    """The best that `metric_for_best_model` has been."""
    best_loss: float | None = None
    """The validation loss there."""
    stale: int = 0
    """Evaluations since one that was better by `early_stopping_threshold`."""
    last_eval: float | None = None
    to_evaluate: bool = False
    """The evaluation of this step was begun and not finished: a run that goes on from here begins with it."""
    skipped: int = 0
    """Steps left out because float16 gradients overflowed."""
    left_out: LeftOut = field(default_factory=LeftOut)
    """Steps left out because their loss or gradients were no numbers."""


@dataclass(frozen=True, slots=True)
class Rehearsed:
    """A step's gradients, computed once and thrown away."""

    seconds: float
    loss: float
    grad_norm: float


@dataclass(slots=True)
class _Window:
    """Sums since the last metrics event."""

    loss: float = 0.0
    count: float = 0.0
    tokens: int = 0
    steps: int = 0
    grad_norm: float = 0.0
    metrics: dict[str, list[float]] = field(default_factory=dict)
    extremes: dict[str, float] = field(default_factory=dict)
    since: float = field(default_factory=time.perf_counter)


class Loop:
    def __init__(
        self,
        *,
        policy: Policy,
        objective: Objective,
        reference: Reference | None = None,
        feed: Feed,
        validation: Sequence[Sample],
        layout: Layout,
        budget: Budget,
        updater: Updater,
        checkpoints: Checkpoints,
        course: Course,
        train: Train,
        emit: Emitter,
        stop_requested: Callable[[], bool],
        evaluation: Evaluation | None = None,
        pulse: Pulse | None = None,
        grace: Grace | None = None,
    ) -> None:
        """`evaluation`: what one measures; the objective on the validation samples, by default. `pulse` hears where it is.
        `grace`: how long a stop may take; as long as it does, by default."""
        self._pulse = pulse or Pulse()
        self._evaluation = evaluation or objective_on(
            validation, objective, policy, reference, layout, budget, emit, stopping(stop_requested)
        )
        self._policy = policy
        policy.weighted_sum = objective.weighted_sum
        self._objective = objective
        self.reference = reference
        self._feed = Ahead(feed, layout, course.total_steps)
        self._validation = validation
        self._layout = layout
        self._budget = budget
        self._gradients = Gradients(policy, objective, reference, updater, budget, stop_requested, layout, self._pulse)
        self.updater = updater
        self._checkpoints = checkpoints
        self._writer = CheckpointWriter(checkpoints, spare_bytes=partial(spare_bytes, budget), emit=emit, grace=grace)
        self._course = course
        self._train = train
        self._emit = emit
        self._window = _Window()
        self.progress = Progress()

    # -- the loop ------------------------------------------------------------------------------------------------------

    def run(self) -> Progress:
        """Runs to the end of the course. Raises InterruptedRun, its state saved, when asked to stop; DivergedError on a loss
        that is no number; OutOfMemoryError when a single sample does not fit."""
        with closing(self._feed), self._writer:
            return self._run()

    def _run(self) -> Progress:
        self._emit.progress("training", self.progress.step, self._course.total_steps, "steps")
        self._window = _Window()
        self.updater.to_training()
        if self.progress.to_evaluate:
            self._evaluate()
        while self.progress.step < self._course.total_steps and not self._out_of_patience():
            before = random_states()
            try:
                went_on = self._step(before)
            except Stopped:
                self._throw_away(before)
                self._interrupted()
            except (EngineError, RewardError):  # raised while the step's samples are made, before anything has changed
                self._throw_away(before)
                self._save_what_is_done()
                raise
            self._writer.check()
            if not went_on:
                continue
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
            self.save(beside=False)
        self.updater.to_evaluation()
        return self.progress

    def _step(self, before: Mapping[str, Tensor]) -> bool:
        """`before`: the random states to begin with, should the step have to be done again. Returns whether the run is a step
        further, and not back at a checkpoint."""
        step = self.progress.step
        self._pulse.at(step, "samples")
        samples, rows = self._feed.take(step, self._budget.begin(step))
        if step in self.progress.left_out.to_pass:
            self._leave_out(step)
            return True
        count = self._objective.count(samples)
        self._policy.model.train()
        with self._budget.watching(step, rows) if rows else nullcontext():
            own = self._gradients.accumulate(samples, rows, count)
            while world.agree(not isinstance(own, StepSums)):
                shortage = None if isinstance(own, StepSums) else own
                self._throw_away(before)
                rows = self._budget.smaller(step, samples, rows, self._layout, shortage)
                own = self._gradients.accumulate(samples, rows, count)
        assert isinstance(own, StepSums)  # noqa: S101 - the loop above ends with nothing else
        self.updater.gather()
        sums = own.over_ranks()
        loss = sums.loss
        if not math.isfinite(loss):
            return self._diverged("loss", loss, samples, before)
        self._pulse.at(step, "update")
        norm = self.updater.clip()
        if not math.isfinite(norm) and not self.updater.scaler.is_enabled():
            return self._diverged("norm of the gradients", norm, samples, before)
        taken = self.updater.update()
        for name, (total, of) in (*sums.metrics.items(), *self._feed.told(step).items()):
            seen = self._window.metrics.setdefault(name, [0.0, 0.0])
            seen[0] += total
            seen[1] += of
        extremes = self._window.extremes
        extremes |= {name: min(value, extremes.get(name, value)) for name, value in sums.least.items()}
        extremes |= {name: max(value, extremes.get(name, value)) for name, value in sums.most.items()}
        tokens = sum(row.tokens for row in rows)
        self.progress.step += 1
        self.progress.left_out.in_a_row = 0
        self.progress.tokens += tokens
        self.progress.trained_tokens += sum(sample.weight for sample in samples)
        self.progress.skipped += not taken
        window = self._window
        window.loss += loss * count
        window.count += count
        window.tokens += tokens
        window.steps += 1
        window.grad_norm = norm
        return True

    def _throw_away(self, before: Mapping[str, Tensor]) -> None:
        """Gradients of a step that is not finished, and what it drew."""
        self.updater.drop()
        self._budget.memory.release()
        restore_random_states(dict(before))

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

    @property
    def steps_left(self) -> int:
        return self._course.total_steps - self.progress.step

    def rehearse(self, rows: tuple[Sequence[Sample], Sequence[Row]] | None = None) -> Rehearsed | None:
        """Gradients of the next step, or of the samples in these rows, computed and thrown away; None when memory ran out.

        Changes nothing: what was drawn, is drawn again. Raises Stopped when asked to stop.
        """
        before = random_states()
        step = self.progress.step
        samples, laid = rows or self._feed.take(step, self._budget.begin(step))
        count = self._objective.count(samples)
        self._policy.model.train()
        # Without the scale of float16, which may be too large at first.
        unscaled = replace(self.updater, scaler=torch.amp.GradScaler(enabled=False))
        forgetting = nullcontext() if self.reference is None else self.reference.forgetting()
        started = time.perf_counter()
        try:
            with forgetting:
                sums = replace(self._gradients, updater=unscaled).accumulate(samples, laid, count)
            if world.agree(not isinstance(sums, StepSums)):
                return None
            assert isinstance(sums, StepSums)  # noqa: S101 - what is agreed on
            self.updater.gather()
            norm = self.updater.norm()  # reading it waits for the device
            return Rehearsed(time.perf_counter() - started, sums.over_ranks().loss, norm)
        finally:
            self._throw_away(before)

    # -- what it says --------------------------------------------------------------------------------------------------

    def _log(self) -> None:
        window = self._window
        if not window.steps:  # all of them were left out
            return
        if window.steps < self._train.logging_steps and self.progress.step < self._course.total_steps:
            return
        seconds = time.perf_counter() - window.since
        values = {
            "loss": window.loss / max(window.count, 1e-12),
            "learning_rate": self.updater.learning_rate,
            "grad_norm": window.grad_norm,
            "tokens_per_second": window.tokens / max(seconds, 1e-9),
            "tokens": float(self.progress.tokens),
            **{name: total / of for name, (total, of) in window.metrics.items() if of},
            **window.extremes,
            **usage(),
        }
        self._emit.metrics(self.progress.step, self._course.epoch(self.progress.step), values)
        self._window = _Window()

    def _evaluate(self) -> None:
        if not len(self._validation):
            return
        started, drawn = time.perf_counter(), random_states()
        self._pulse.at(self.progress.step, "evaluation")
        self.progress.to_evaluate = True
        self._policy.model.eval()
        self.updater.to_evaluation()
        try:
            measured = self._evaluation()
        except (EngineError, RewardError, Stopped) as error:
            self.updater.to_training()
            restore_random_states(drawn)
            if isinstance(error, Stopped):
                self._interrupted()
            self._save_what_is_done()
            raise
        self.updater.to_training()
        self.progress.to_evaluate = False
        loss = measured.loss
        self.updater.plateau(loss)
        values = {
            "eval_loss": loss,
            f"eval_{self._objective.unit}": measured.count,
            "eval_seconds": time.perf_counter() - started,
            **{f"eval_{name}": value for name, value in measured.metrics.items()},
        }
        self._emit.metrics(self.progress.step, self._course.epoch(self.progress.step), values)
        self.progress.last_eval = loss
        self._keep_the_best(values[self._train.metric_for_best_model], loss)
        self._window.since = time.perf_counter()

    def _keep_the_best(self, metric: float, loss: float) -> None:
        """Saves an evaluation's weights where its metric is better than every one before."""
        gain = math.inf
        if self.progress.best is not None:
            gain = metric - self.progress.best
            gain = gain if greater_is_better(self._train.metric_for_best_model) else -gain
        better = math.isfinite(metric) and gain > 0
        enough = better and gain > self._train.early_stopping_threshold
        self.progress.stale = 0 if enough else self.progress.stale + 1
        if better:
            self.progress.best, self.progress.best_loss = metric, loss
            if self._train.save_strategy != "no":
                self.save(metric=metric, better=True)

    def _diverged(self, what: str, value: float, samples: Sequence[Sample], before: Mapping[str, Tensor]) -> bool:
        """What `train.on_divergence` says is done about it; returns as `_step` does. Raises DivergedError where training ends."""
        self._writer.wait()
        self.updater.drop()
        step, left_out = self.progress.step, self.progress.left_out
        blame = Blame(self._policy, self._objective, self.reference, self._layout)
        by = blame.by_loss if what == "loss" or world.together() else blame.by_gradients
        found = Divergence(what, value, step + 1, by(samples, self._budget.tokens), len(samples))
        self._throw_away(before)
        last = world.told_by_first(self._checkpoints.index().last)
        then = f"the last checkpoint is {last}" if last else "there is no checkpoint yet"
        policy = self._train.on_divergence
        if policy == "roll_back" and last and left_out.may_roll_back():
            return self._roll_back(found)
        if policy == "stop" or not left_out.may_skip() or (policy == "roll_back" and last):
            raise found.error(then + left_out.limit_met(policy))
        self._emit.warning(found.told("its update is left out"), where=found.where)
        self._leave_out(step)
        left_out.in_a_row += 1
        return True

    def _leave_out(self, step: int) -> None:
        self.progress.step = step + 1
        self.progress.left_out.steps += 1

    def _roll_back(self, found: Divergence) -> bool:
        """Goes back to the last good checkpoint. The step that was bad is passed over when its turn comes again."""
        bad, before = self.progress.step, self.progress.left_out
        found_last: Snapshot | None = None
        if world.rank() == 0:
            found_last = self._checkpoints.load_last(
                lambda name, why: self._emit.warning(f"{name} is damaged and passed over: {why}"), finite=True
            )
        snapshot = shared(found_last)
        assert snapshot is not None  # noqa: S101 - the first rank has one, or has raised
        self._writer.start_over()
        self.restore(snapshot)
        self._window = _Window()
        self.progress.left_out = before.after_roll_back(self.progress.left_out, snapshot.step, bad)
        passed = [one + 1 for one in self.progress.left_out.to_pass if one >= snapshot.step]
        self._emit.warning(
            found.told(f"training goes back to step {snapshot.step} and passes over {_steps(passed)}"),
            where=found.where,
        )
        return False

    def _interrupted(self) -> None:
        if self._train.save_strategy != "no":
            step = self.progress.step
            saved = self._with_snapshots(lambda take: self._writer.save_at_the_end(step, self.state_bytes, take))
            if saved < step:
                raise InterruptedRun(
                    f"stopped after step {step}; saved is step {saved}, for another checkpoint takes longer than a stop may",
                    hint="a longer `launch.grace_s`, or a shorter `train.save_steps`, loses fewer steps",
                )
            raise InterruptedRun(f"stopped after step {step}; a checkpoint is saved")
        raise InterruptedRun(
            f"stopped after step {self.progress.step}; `train.save_strategy: no` keeps nothing to resume",
            hint="`--resume` begins this run anew; with `train.save_strategy: steps` a run can be stopped and gone on with",
        )

    # -- state ---------------------------------------------------------------------------------------------------------

    def _save_what_is_done(self) -> None:
        """For another try, when what training depends on elsewhere is there again."""
        if self._train.save_strategy != "no" and self.progress.step:
            self.save(beside=False)
            self._emit.note(
                f"a checkpoint of step {self.progress.step} is saved; `tunedock train --resume` goes on from it"
            )

    def save(self, *, metric: float | None = None, better: bool = False, beside: bool = True) -> None:
        """Saves a checkpoint, `beside` the steps that follow or before this returns."""
        step = self.progress.step
        self._pulse.at(step, "checkpoint", patient=True)
        self._with_snapshots(
            lambda take: self._writer.save(step, self.state_bytes, take, metric=metric, better=better, beside=beside)
        )

    def _with_snapshots(self, work: Callable[[Callable[[bool], Snapshot]], T]) -> T:
        """What the first rank's `work` gives, on all. It may take snapshots, which the others help to put together."""
        if not world.together():
            return work(self._snapshot)

        def take(copy: bool) -> Snapshot:
            world.told_by_first("take")
            return self._snapshot(copy)

        if world.rank() == 0:
            made = work(take)
            world.told_by_first([made])
            return made
        while (told := world.told_by_first(None)) == "take":
            self._snapshot()
        value: T = told[0]
        return value

    @property
    def state_bytes(self) -> int:
        """Of a checkpoint, but for what is small."""
        return self.updater.state_bytes

    def _snapshot(self, copy: bool = False) -> Snapshot:
        """All of it on the first rank; the others help to put it together. With `copy`, one that no later step changes."""
        tensors, numbers = self.updater.optimizer_state(copy=copy)
        progress = asdict(self.progress)
        state = {
            "progress": progress,
            "optimizer": numbers,
            "schedule": _plain_schedule(self.updater.schedule.state_dict()),
            "scaler": self.updater.scaler.state_dict(),
            "feed": self._feed.state(self.progress.step),
            "budget": self._budget.state(),
        }
        return Snapshot(
            step=self.progress.step,
            trained=self.updater.trained_state(copy=copy),
            optimizer_tensors=tensors,
            state=deepcopy(state) if copy else state,
            random=random_states_of_all(),
            reference={} if self.reference is None else self.reference.state(),
            feed=self._feed.tensors(self.progress.step),
        )

    def take_weights(self, snapshot: Snapshot) -> None:
        """The weights a snapshot was evaluated with, and nothing else of it: the run's result."""
        self.updater.load_trained(snapshot.trained)
        if self.updater.averages:
            self.updater.restore(snapshot.optimizer_tensors, snapshot.state["optimizer"])
            self.updater.to_evaluation()

    def restore(self, snapshot: Snapshot) -> None:
        """Goes on exactly where the snapshot was taken."""
        if self.reference is not None:
            self.reference.restore(snapshot.reference)
        self.updater.load_trained(snapshot.trained)
        state = snapshot.state
        self.updater.restore(snapshot.optimizer_tensors, state["optimizer"])
        self.updater.schedule.load_state_dict(state["schedule"])
        self.updater.scaler.load_state_dict(state["scaler"])
        self._feed.restore(state["feed"], snapshot.feed)
        self._budget.restore(state.get("budget", ()))
        progress = {
            "best_loss": state["progress"]["best"],
            **state["progress"],
        }  # before it was kept, the loss was the metric
        self.progress = Progress(**progress | {"left_out": LeftOut.of(progress.get("left_out", {}))})
        restore_random_states(snapshot.random, seed=self._train.seed)


def _plain_schedule(state: Mapping[str, Any]) -> dict[str, Any]:
    """A schedule's numbers; its functions are made again from the recipe."""
    return {name: value for name, value in state.items() if isinstance(value, int | float | str | list | dict | None)}


def _steps(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"step {numbers[0]}"
    together = numbers[-1] - numbers[0] == len(numbers) - 1
    return f"steps {numbers[0]} to {numbers[-1]}" if together else f"steps {', '.join(map(str, numbers))}"
