"""Which side of the split a row is on: train, validation or test.

A row's key is its group's value, or a hash of its content; keys are ordered by a seeded hash. So the split depends on the data and
the seed alone, not on the order of files, the machine or a random generator's version; equal rows and siblings of a group never
stand on two sides. Held-out sides are rounded up, as `train_test_split` does: 2876 rows with 15 % validation leave 2444
to train on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tunedock.errors import DataError
from tunedock.plan.steps import split_sizes
from tunedock.recipe.schema import Split

Side = Literal["train", "validation", "test"]
SIDES: tuple[Side, ...] = ("train", "validation", "test")


def place(key: str, seed: int) -> float:
    """A number in [0, 1), uniform over keys, fixed by key and seed."""
    digest = hashlib.blake2b(
        key.encode("utf-8", "surrogatepass"), key=seed.to_bytes(8, "little", signed=True), digest_size=8
    )
    return int.from_bytes(digest.digest(), "big") / 2**64


def assign(keys: Sequence[str], split: Split) -> dict[Side, NDArray[np.int64]]:
    """Indices of the rows of each side, ascending.

    Rows with the same key stay together, so a side may be larger or smaller than asked for by part of a group.
    Raises DataError when nothing is left to train on.
    """
    sizes = dict(zip(SIDES, split_sizes(len(keys), split), strict=True))
    groups: dict[str, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    order = sorted(groups, key=lambda key: (place(key, split.seed), key))
    sides: dict[Side, list[int]] = {side: [] for side in SIDES}
    held_out: tuple[Side, ...] = ("test", "validation")
    for key in order:
        side: Side = next((s for s in held_out if len(sides[s]) < sizes[s]), SIDES[0])
        sides[side].extend(groups[key])
    if not sides["train"]:
        raise DataError(
            f"{len(keys)} row(s) in {len(groups)} group(s) leave none to train on with the split {split.train:g}/"
            f"{split.validation:g}/{split.test:g}",
            where="data.split",
            hint="add rows, set `data.split` to {train: 1, validation: 0, test: 0}, or give own files in `data.validation`",
        )
    return {side: np.asarray(sorted(indices), np.int64) for side, indices in sides.items()}


def side_of(key: str, split: Split) -> Side:
    """The side of one row of a stream, whose number of rows nobody knows: by its place alone."""
    at = place(key, split.seed)
    if at < split.test:
        return "test"
    return "validation" if at < split.test + split.validation else "train"
