"""One of two ranks on two machines, as they are told: `torchrun ... patient_rank.py FOLDER` writes what becomes of waiting for more
than a collective call's time-out."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from tunedock.errors import RewardError, TunedockError
from tunedock.model import world

TIMEOUT_S = 1.5


def main(folder: Path) -> None:
    os.environ["GROUP_RANK"] = os.environ["RANK"]  # each is the first of a machine
    with world.joined(timeout_s=TIMEOUT_S) as own:
        late, failing = own.number == 1, own.number == 1

        def work() -> int:
            time.sleep(2 * TIMEOUT_S if late else 0)
            return own.number

        done = world.after_the_first_here(work, name="data", leads=True)
        world.agree(False)
        time.sleep(2 * TIMEOUT_S if own.leads else 0)
        told = world.told_by_first("read")
        raised: list[str | None] = []
        try:
            world.raise_together(RewardError("no score", where="row 3") if failing else None)
        except TunedockError as error:
            raised = [type(error).__name__, error.message, error.where]
        said = {"work": done, "told": told, "raised": raised, "in step": world.told_by_all(own.number)}
    (folder / f"{own.number}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
