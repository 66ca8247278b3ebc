"""Where the loop's steps come from, and the thread that has the next one ready."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from tunedock.data.layout import Row, step_indices
from tunedock.data.sample import Sample
from tunedock.data.store import SampleStore
from tunedock.train.budget import Layout


class Feed(Protocol):
    """Samples by optimizer step. A step asked for again gives the same samples."""

    def step(self, number: int) -> list[Sample]:
        """The samples of step `number`, counted from 0."""

    def state(self, number: int) -> dict[str, Any]:
        """What a checkpoint keeps so that `restore` goes on with step `number`, the next to be done; it may have been asked for."""

    def tensors(self, number: int) -> dict[str, Tensor]:
        """What else it keeps: larger than belongs into `state`."""

    def restore(self, state: dict[str, Any], tensors: Mapping[str, Tensor]) -> None: ...

    def may_be_drawn_ahead(self, number: int) -> bool:
        """Whether step `number` depends on nothing that the step before it computes."""

    def told(self, number: int) -> Mapping[str, tuple[float, float]]:
        """Metrics of how step `number` came about: name -> (sum, what it is divided by)."""


class FixedFeed:
    """What a feed of given data has in common with others: nothing is drawn from the model."""

    def tensors(self, number: int) -> dict[str, Tensor]:
        return {}

    def may_be_drawn_ahead(self, number: int) -> bool:
        return True

    def told(self, number: int) -> Mapping[str, tuple[float, float]]:
        return {}


class StoreFeed(FixedFeed):
    """Steps of a store on disk: any step in constant time, from seed and number alone."""

    def __init__(self, store: SampleStore, *, batch_size: int, seed: int) -> None:
        self._store = store
        self._batch_size = batch_size
        self._seed = seed

    @property
    def samples(self) -> SampleStore:
        """All of them, in the order of the data."""
        return self._store

    def step(self, number: int) -> list[Sample]:
        return self._store.samples(step_indices(len(self._store), self._batch_size, number, seed=self._seed))

    def state(self, number: int) -> dict[str, Any]:
        return {"kind": "store", "samples": len(self._store)}

    def restore(self, state: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Nothing to do: the step number says it all."""


@dataclass(frozen=True, slots=True)
class _Ready:
    samples: list[Sample]
    rows: list[Row]
    budget_tokens: int


class Ahead:
    """A feed whose next step is read and laid out by a thread while the current one computes, where it may be.

    One step ahead and no further, so that memory and a stream's position stay bounded. The feed's state is noted before each step
    is drawn: a checkpoint keeps where the next step *begins*, however far the thread has come. A feed's error comes up with the
    step it belongs to.
    """

    def __init__(self, feed: Feed, layout: Layout, total_steps: int) -> None:
        self._feed = feed
        self._layout = layout
        self._total = total_steps
        self._worker: ThreadPoolExecutor | None = None
        self._drawn: dict[int, Future[_Ready]] = {}
        self._states: dict[int, dict[str, Any]] = {}

    def take(self, number: int, budget_tokens: int) -> tuple[Sequence[Sample], list[Row]]:
        """Samples and rows of a step; the thread begins with the one after it."""
        for old in [step for step in self._drawn if step < number]:
            del self._drawn[old]
            self._states.pop(old, None)
        if number not in self._drawn and not self._feed.may_be_drawn_ahead(number):
            # By this thread: another one would have a team of its own for the products.
            self._drawn[number] = _done(self._draw(number, budget_tokens))
        self._begin(number, budget_tokens)
        ready = self._drawn[number].result()
        if number + 1 < self._total and self._feed.may_be_drawn_ahead(number + 1):
            self._begin(number + 1, budget_tokens)
        if ready.budget_tokens == budget_tokens:
            return ready.samples, ready.rows
        return ready.samples, self._layout(ready.samples, budget_tokens=budget_tokens)

    def state(self, number: int) -> dict[str, Any]:
        """As `Feed.state`. Waits for the thread."""
        self._wait()
        return self._states[number] if number in self._states else self._feed.state(number)

    def tensors(self, number: int) -> dict[str, Tensor]:
        """As `Feed.tensors`."""
        self._wait()
        return self._feed.tensors(number)

    def told(self, number: int) -> Mapping[str, tuple[float, float]]:
        """As `Feed.told`."""
        return self._feed.told(number)

    def restore(self, state: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self._wait()
        self._drawn.clear()
        self._states.clear()
        self._feed.restore(state, tensors)

    def close(self) -> None:
        """Ends the thread; a step asked for later starts another."""
        if self._worker is not None:
            self._worker.shutdown(wait=True)
            self._worker = None

    def _begin(self, number: int, budget_tokens: int) -> None:
        if self._worker is None:
            self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="next step")
        if number not in self._drawn:
            self._drawn[number] = self._worker.submit(self._draw, number, budget_tokens)

    def _draw(self, number: int, budget_tokens: int) -> _Ready:
        self._states[number] = self._feed.state(number)
        samples = self._feed.step(number)
        return _Ready(samples, self._layout(samples, budget_tokens=budget_tokens), budget_tokens)

    def _wait(self) -> None:
        for drawn in self._drawn.values():
            drawn.exception()


def _done(ready: _Ready) -> Future[_Ready]:
    future: Future[_Ready] = Future()
    future.set_result(ready)
    return future
