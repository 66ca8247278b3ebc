"""What a loop saves and goes on from: its state as a snapshot, and a checkpoint of it where one is due.

Where several ranks train together only the first one writes; the others help to put together what is spread over them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

from tunedock.events import Emitter
from tunedock.model import world
from tunedock.model.reference import Reference
from tunedock.run.pulse import Pulse
from tunedock.train.budget import Budget
from tunedock.train.checkpoint import Checkpoints, Snapshot
from tunedock.train.checkpoint_writer import CheckpointWriter, spare_bytes
from tunedock.train.feed import Ahead
from tunedock.train.grace import Grace
from tunedock.train.optimizer import Updater
from tunedock.train.parallel.shared import shared
from tunedock.train.progress import Progress
from tunedock.train.random_states import random_states_of_all, restore_random_states

T = TypeVar("T")


@dataclass(slots=True)
class State:
    """All that decides how a run goes on."""

    progress: Progress
    updater: Updater
    reference: Reference | None
    feed: Ahead
    budget: Budget
    seed: int
    """For a rank the checkpoint does not know."""

    @property
    def size_bytes(self) -> int:
        """Of a snapshot, but for what is small."""
        return self.updater.state_bytes

    def snapshot(self, copy: bool = False) -> Snapshot:
        """All of it on the first rank. With `copy`, one that no later step changes. A collective call."""
        tensors, numbers = self.updater.optimizer_state(copy=copy)
        state = {
            "progress": self.progress.to_json(),
            "optimizer": numbers,
            "schedule": _plain_schedule(self.updater.schedule.state_dict()),
            "scaler": self.updater.scaler.state_dict(),
            "feed": self.feed.state(self.progress.step),
            "budget": self.budget.state(),
        }
        return Snapshot(
            step=self.progress.step,
            trained=self.updater.trained_state(copy=copy),
            optimizer_tensors=tensors,
            state=deepcopy(state) if copy else state,
            random=random_states_of_all(),
            reference={} if self.reference is None else self.reference.state(),
            feed=self.feed.tensors(self.progress.step),
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Goes on exactly where the snapshot was taken. A collective call."""
        if self.reference is not None:
            self.reference.restore(snapshot.reference)
        self.updater.load_trained(snapshot.trained)
        state = snapshot.state
        self.updater.restore(snapshot.optimizer_tensors, state["optimizer"])
        self.updater.schedule.load_state_dict(state["schedule"])
        self.updater.scaler.load_state_dict(state["scaler"])
        self.feed.restore(state["feed"], snapshot.feed)
        self.budget.restore(state.get("budget", ()))
        self.progress = Progress.of(state["progress"])
        restore_random_states(snapshot.random, seed=self.seed)

    def take_weights(self, snapshot: Snapshot) -> None:
        """The weights a snapshot was evaluated with, and nothing else of it. A collective call."""
        self.updater.load_trained(snapshot.trained)
        if self.updater.averages:
            self.updater.restore(snapshot.optimizer_tensors, snapshot.state["optimizer"])
            self.updater.to_evaluation()


class Saver:
    """Checkpoints of a state. A context: at its end nothing is in flight. Every method but `check` is a collective call."""

    def __init__(
        self, state: State, checkpoints: Checkpoints, *, pulse: Pulse, emit: Emitter, grace: Grace | None = None
    ) -> None:
        self._state = state
        self._checkpoints = checkpoints
        self._pulse = pulse
        self._emit = emit
        self.writer = CheckpointWriter(
            checkpoints, spare_bytes=partial(spare_bytes, state.budget), emit=emit, grace=grace
        )

    def __enter__(self) -> Saver:
        self.writer.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.writer.__exit__(kind, error, traceback)

    def save(self, *, metric: float | None = None, better: bool = False, beside: bool = True) -> None:
        """`beside` the steps that follow, or before this returns. `better`: its `metric` is the best so far."""
        step = self._at_it()
        self._with_snapshots(
            lambda take: self.writer.save(
                step, self._state.size_bytes, take, metric=metric, better=better, beside=beside
            )
        )

    def save_at_the_end(self) -> int:
        """Before training stops, if there is time for it. The step of the newest checkpoint that is on disk."""
        step = self._at_it()
        return self._with_snapshots(lambda take: self.writer.save_at_the_end(step, self._state.size_bytes, take))

    def check(self) -> None:
        """Raises what a save failed with, once it is known."""
        self.writer.check()

    def last(self) -> str | None:
        """The newest checkpoint's name, once nothing is in flight."""
        self._at_it()
        self.writer.wait()
        name: str | None = world.told_by_first(self._checkpoints.index().last)
        return name

    def go_back(self) -> int:
        """Restores the last good checkpoint whose numbers are numbers; its step. Steps that were saved are saved again when they
        come again."""
        self._at_it()
        found: Snapshot | None = None
        if world.rank() == 0:
            found = self._checkpoints.load_last(
                lambda name, why: self._emit.warning(f"{name} is damaged and passed over: {why}"), finite=True
            )
        snapshot = shared(found)
        assert snapshot is not None  # noqa: S101 - the first rank has one, or has raised
        self.writer.start_over()
        self._state.restore(snapshot)
        return snapshot.step

    def _at_it(self) -> int:
        """Has the pulse say so, for a checkpoint takes as long as it takes; the step that is done."""
        self._pulse.at(self._state.progress.step, "checkpoint", patient=True)
        return self._state.progress.step

    def _with_snapshots(self, work: Callable[[Callable[[bool], Snapshot]], T]) -> T:
        """What the first rank's `work` gives, on all. It may take snapshots, which the others help to put together."""
        if not world.together():
            return work(self._state.snapshot)

        def take(copy: bool) -> Snapshot:
            world.told_by_first("take")
            return self._state.snapshot(copy)

        if world.rank() == 0:
            made = work(take)
            world.told_by_first([made])
            return made
        while (told := world.told_by_first(None)) == "take":
            self._state.snapshot()
        value: T = told[0]
        return value


def _plain_schedule(state: Mapping[str, Any]) -> dict[str, Any]:
    """A schedule's numbers; its functions are made again from the recipe."""
    return {name: value for name, value in state.items() if isinstance(value, int | float | str | list | dict | None)}
