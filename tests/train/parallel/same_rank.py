"""One of two ranks: `torchrun ... same_rank.py FOLDER` writes what is said of weights that the second one has otherwise."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import nn

from tunedock.errors import ModelError
from tunedock.model import world
from tunedock.train.parallel.replicated import require_same_weights


def main(folder: Path) -> None:
    with world.joined(timeout_s=30) as own:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 5, dtype=torch.bfloat16), nn.LayerNorm(5), nn.Linear(5, 2))
        model[1].requires_grad_(False)
        said = []
        for place in (None, 0, 1):
            if place is not None and own.number == 1:
                model[place].weight.data[-1].mul_(1.01)
            try:
                require_same_weights(model)
                said.append("the same")
            except ModelError as error:
                said.append(f"{error.message} | {error.where}")
    (folder / f"{own.number}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
