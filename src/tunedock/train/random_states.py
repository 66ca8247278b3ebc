"""The states of the generators a run draws from, of every rank, as tensors: without pickle.

A checkpoint of one process has them by their names, one of several by rank (`1/torch`). A rank that the checkpoint does not know,
since the run goes on with more of them, begins with a state of its own.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from tunedock.model import world


def seed_rank(seed: int) -> None:
    """Seeds torch's generator: each rank its own way, for what it draws is for other samples than the others'."""
    torch.manual_seed(seed if world.rank() == 0 else (seed + 0x9E3779B97F4A7C15 * world.rank()) % (1 << 63))


def random_states_of_all() -> dict[str, Tensor]:
    """Every rank's, on all of them. A collective call."""
    own = random_states()
    if not world.together():
        return own
    found = {name: world.joined_up(own[name][None]) for name in sorted(own)}
    return {f"{rank}/{name}": of_all[rank] for name, of_all in found.items() for rank in range(world.size())}


def random_states() -> dict[str, Tensor]:
    """Every generator this process draws from, as byte tensors."""
    version, internal, gauss = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(internal, dtype=torch.int64),
        "python_rest": torch.tensor([version, gauss is not None, gauss or 0.0], dtype=torch.float64),
    }
    kind, keys, position, has_gauss, cached = np.random.get_state()
    if kind != "MT19937":
        raise ValueError(f"numpy's global generator is {kind}, not MT19937")
    states["numpy"] = torch.from_numpy(np.asarray(keys, np.int64))
    states["numpy_rest"] = torch.tensor([position, has_gauss, cached], dtype=torch.float64)
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_states(states: Mapping[str, Tensor], *, seed: int | None = None) -> None:
    """Puts back what `random_states` gave here; with a `seed`, this rank's of a checkpoint's, or what the seed makes of one that
    the checkpoint does not know."""
    own = states if seed is None else _of_this_rank(states)
    if seed is not None and not own:
        seed_rank(seed)
        return
    torch.set_rng_state(own["torch"])
    version, has_gauss, gauss = own["python_rest"].tolist()
    random.setstate((int(version), tuple(own["python"].tolist()), gauss if has_gauss else None))
    position, has_cached, cached = own["numpy_rest"].tolist()
    keys = own["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_cached), cached))
    if "cuda" in own and torch.cuda.is_available():
        torch.cuda.set_rng_state(own["cuda"])


def _of_this_rank(states: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a checkpoint's; one process's are the first rank's."""
    by_rank = states if "0/torch" in states else {f"0/{name}": state for name, state in states.items()}
    mine = f"{world.rank()}/"
    return {name.removeprefix(mine): state for name, state in by_rank.items() if name.startswith(mine)}
