"""Where the loop's steps come from."""

from __future__ import annotations

from typing import Any, Protocol

from tunedock.data.layout import step_indices
from tunedock.data.sample import Sample
from tunedock.data.store import SampleStore


class Feed(Protocol):
    """Samples by optimizer step. A step asked for again gives the same samples."""

    def step(self, number: int) -> list[Sample]:
        """The samples of step `number`, counted from 0."""

    def state(self, number: int) -> dict[str, Any]:
        """What a checkpoint keeps so that `restore` goes on with step `number`, the next to be done; it may have been asked for."""

    def restore(self, state: dict[str, Any]) -> None: ...


class StoreFeed:
    """Steps of a store on disk: any step in constant time, from seed and number alone."""

    def __init__(self, store: SampleStore, *, batch_size: int, seed: int) -> None:
        self._store = store
        self._batch_size = batch_size
        self._seed = seed

    def step(self, number: int) -> list[Sample]:
        return self._store.samples(step_indices(len(self._store), self._batch_size, number, seed=self._seed))

    def state(self, number: int) -> dict[str, Any]:
        return {"kind": "store", "samples": len(self._store)}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing to do: the step number says it all."""
