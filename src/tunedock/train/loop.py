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
from dataclasses import dataclass, replace

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
from tunedock.train.checkpoint import Checkpoints
from tunedock.train.divergence import Blame, Divergence
from tunedock.train.evaluation import Evaluation, objective_on, stopping
from tunedock.train.feed import Ahead, Feed
from tunedock.train.grace import Grace
from tunedock.train.machine import usage
from tunedock.train.metric_names import greater_is_better
from tunedock.train.optimizer import Updater
from tunedock.train.progress import Course, Progress
from tunedock.train.random_states import random_states, restore_random_states
from tunedock.train.saving import Saver, State
from tunedock.train.step import Gradients, Stopped
from tunedock.train.window import Window


@dataclass(frozen=True, slots=True)
class Rehearsed:
    """A step's gradients, computed once and thrown away."""

    seconds: float
    loss: float
    grad_norm: float


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
        self._feed = Ahead(feed, layout, course.total_steps)
        self.state = State(Progress(), updater, reference, self._feed, budget, train.seed)
        self._validation = validation
        self._layout = layout
        self._budget = budget
        self._gradients = Gradients(policy, objective, reference, updater, budget, stop_requested, layout, self._pulse)
        self.updater = updater
        self.saver = Saver(self.state, checkpoints, pulse=self._pulse, emit=emit, grace=grace)
        self._course = course
        self._train = train
        self._emit = emit
        self._window = Window()

    @property
    def progress(self) -> Progress:
        return self.state.progress

    # -- the loop ------------------------------------------------------------------------------------------------------

    def run(self) -> Progress:
        """Runs to the end of the course. Raises InterruptedRun, its state saved, when asked to stop; DivergedError on a loss
        that is no number; OutOfMemoryError when a single sample does not fit."""
        with closing(self._feed), self.saver:
            return self._run()

    def _run(self) -> Progress:
        self._emit.progress("training", self.progress.step, self._course.total_steps, "steps")
        self._window = Window()
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
            self.saver.check()
            if not went_on:
                continue
            self._log()
            if self._due(self._train.eval_strategy, self._train.eval_steps or self._train.save_steps):
                self._evaluate()
            if self._due(self._train.save_strategy, self._train.save_steps):
                self.saver.save()
            self._emit.progress("training", self.progress.step, self._course.total_steps, "steps")
        if self._out_of_patience():
            self._emit.note(
                f"early stopping: {self.progress.stale} evaluations without improvement; the best is {self.progress.best}",
                step=self.progress.step,
            )
        if self._train.save_strategy != "no":
            self.saver.save(beside=False)
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
        tokens = sum(row.tokens for row in rows)
        self._window.add(sums, self._feed.told(step), count=count, tokens=tokens, grad_norm=norm)
        self.progress.step += 1
        self.progress.left_out.in_a_row = 0
        self.progress.tokens += tokens
        self.progress.trained_tokens += sum(sample.weight for sample in samples)
        self.progress.skipped += not taken
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
        return strategy == "epoch" and self._course.ends_epoch(step)

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
        forgetting = nullcontext() if self.state.reference is None else self.state.reference.forgetting()
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
        values = {
            "loss": window.loss,
            "learning_rate": self.updater.learning_rate,
            "grad_norm": window.grad_norm,
            "tokens_per_second": window.tokens_per_second,
            "tokens": float(self.progress.tokens),
            **window.metrics,
            **usage(),
        }
        self._emit.metrics(self.progress.step, self._course.epoch(self.progress.step), values)
        self._window = Window()

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
        metric = values[self._train.metric_for_best_model]
        better = self.progress.evaluated(
            metric,
            loss,
            greater_is_better=greater_is_better(self._train.metric_for_best_model),
            threshold=self._train.early_stopping_threshold,
        )
        if better and self._train.save_strategy != "no":
            self.saver.save(metric=metric, better=True)
        self._window.since = time.perf_counter()

    def _diverged(self, what: str, value: float, samples: Sequence[Sample], before: Mapping[str, Tensor]) -> bool:
        """What `train.on_divergence` says is done about it; returns as `_step` does. Raises DivergedError where training ends."""
        last = self.saver.last()
        self.updater.drop()
        step, left_out = self.progress.step, self.progress.left_out
        blame = Blame(self._policy, self._objective, self.state.reference, self._layout)
        by = blame.by_loss if what == "loss" or world.together() else blame.by_gradients
        found = Divergence(what, value, step + 1, by(samples, self._budget.tokens), len(samples))
        self._throw_away(before)
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
        step = self.saver.go_back()
        self._window = Window()
        self.progress.left_out = before.after_roll_back(self.progress.left_out, step, bad)
        passed = [one + 1 for one in self.progress.left_out.to_pass if one >= step]
        self._emit.warning(
            found.told(f"training goes back to step {step} and passes over {_steps(passed)}"),
            where=found.where,
        )
        return False

    def _interrupted(self) -> None:
        if self._train.save_strategy != "no":
            step = self.progress.step
            saved = self.saver.save_at_the_end()
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

    def _save_what_is_done(self) -> None:
        """For another try, when what training depends on elsewhere is there again."""
        if self._train.save_strategy != "no" and self.progress.step:
            self.saver.save(beside=False)
            self._emit.note(
                f"a checkpoint of step {self.progress.step} is saved; `tunedock train --resume` goes on from it"
            )


def _steps(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"step {numbers[0]}"
    together = numbers[-1] - numbers[0] == len(numbers) - 1
    return f"steps {numbers[0]} to {numbers[-1]}" if together else f"steps {', '.join(map(str, numbers))}"
