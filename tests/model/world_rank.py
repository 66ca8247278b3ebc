"""One of several ranks: `torchrun ... world_rank.py FILE` writes what `model.world` answers there."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from tunedock.model import world


def main(folder: Path) -> None:
    done: list[int] = []
    with world.joined(timeout_s=60) as own:
        work = world.after_the_first_here(lambda: _work(folder, own.number), name="work", leads=own.local == 0)
        time.sleep(0.3 * own.number)
        world.wait_for_all()
        world.wait_for_all()
        done.append(own.number)
        tensors = {"a": torch.arange(6).reshape(2, 3), "none": torch.zeros(0, 4), "b": torch.tensor(0.1).bfloat16()}
        received = dict(world.tensors_of_first(tensors if own.leads else {}))
        said = {
            "rank": [own.number, own.world, world.rank(), world.size()],
            "agree": [world.agree(own.number == 1), world.agree(False), world.agree(True)],
            "least": world.least(10 - own.number),
            "sum": world.add_up(torch.full((2,), own.number + 0.5)).tolist(),
            "joined": world.joined_up(torch.full((own.number, 2), float(own.number))).tolist(),
            "all": world.told_by_all({"你好": own.number, "text": "x" * own.number}),
            "first": world.told_by_first(["first", own.number]),
            "own": list(world.own_of(5)),
            "order": world.in_order(5, world.own_of(5), [[i, own.number] for i in world.own_of(5)]),
            "tensors": {k: [str(v.dtype), list(v.shape), v.float().tolist()] for k, v in received.items()},
            "work": work,
        }
    (folder / f"{own.number}.json").write_text(json.dumps(said))


def _work(folder: Path, rank: int) -> int:
    """What the first one leaves, the others find."""
    file = folder / "left"
    if not file.exists():
        time.sleep(0.5)
        file.write_text(str(rank))
    return int(file.read_text())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
