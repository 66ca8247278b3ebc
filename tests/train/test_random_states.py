"""The generators of a rank: what a step that is thrown away has drawn is drawn again, on each rank its own."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from tunedock.model import world
from tunedock.train.random_states import random_states, restore_random_states, seed_rank


def drawn() -> list[float]:
    return [float(torch.rand(())), random.random(), float(np.random.random())]


@pytest.fixture(autouse=True, params=[0, 1])
def rank(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    number: int = request.param
    monkeypatch.setattr(world, "rank", lambda: number)
    return number


def test_what_was_drawn_is_drawn_again_on_every_rank() -> None:
    seed_rank(7)
    torch.rand(3)
    before = random_states()
    first = drawn()
    restore_random_states(before)
    assert drawn() == first


def test_a_checkpoint_gives_each_rank_its_own_and_a_new_one_what_the_seed_makes(rank: int) -> None:
    own = {}
    for number in (0, 1):
        torch.manual_seed(100 + number)
        own |= {f"{number}/{name}": state for name, state in random_states().items()}
    restore_random_states(own, seed=7)
    assert torch.initial_seed() == 100 + rank
    of_one = {name.removeprefix("0/"): state for name, state in own.items() if name.startswith("0/")}
    restore_random_states(of_one, seed=7)
    seeded = torch.initial_seed()
    seed_rank(7)
    assert seeded == (100 if rank == 0 else torch.initial_seed())
