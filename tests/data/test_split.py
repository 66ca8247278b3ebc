from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunedock.data.split import SIDES, assign, place, side_of
from tunedock.errors import DataError
from tunedock.recipe.schema import Split


@given(st.lists(st.text(max_size=4), min_size=20, max_size=200), st.integers(0, 2**31))
def test_a_partition_that_keeps_groups_whole(keys: list[str], seed: int) -> None:
    if len(set(keys)) < 4:
        return
    try:
        sides = assign(keys, Split(seed=seed))
    except DataError:  # one group may be nearly all rows
        return
    assert sorted(np.concatenate(list(sides.values())).tolist()) == list(range(len(keys)))
    home = {}
    for side in SIDES:
        for index in sides[side]:
            assert home.setdefault(keys[index], side) == side


def test_sizes_are_exact_when_every_row_is_its_own_group() -> None:
    sides = assign([f"row {i}" for i in range(1000)], Split())
    assert {side: len(sides[side]) for side in SIDES} == {"train": 800, "validation": 100, "test": 100}


def test_the_order_of_rows_does_not_matter() -> None:
    keys = [f"row {i}" for i in range(100)]
    there = {keys[i] for i in assign(keys, Split())["test"]}
    back = keys[::-1]
    assert {back[i] for i in assign(back, Split())["test"]} == there


def test_another_seed_is_another_split() -> None:
    keys = [f"row {i}" for i in range(100)]
    assert assign(keys, Split(seed=1))["test"].tolist() != assign(keys, Split(seed=2))["test"].tolist()


def test_the_same_on_every_machine() -> None:
    """Pinned: a change here moves rows of every user from training to test."""
    assert place("row 0", 42) == pytest.approx(0.1642819093602267, abs=1e-12)


def test_nothing_left_to_train_on_is_an_error() -> None:
    with pytest.raises(DataError, match="none to train on"):
        assign(["only"], Split())


def test_a_stream_is_split_in_about_the_same_shares() -> None:
    sides = [side_of(f"row {i}", Split()) for i in range(10_000)]
    assert abs(sides.count("train") / 10_000 - 0.8) < 0.02
    assert abs(sides.count("test") / 10_000 - 0.1) < 0.015
