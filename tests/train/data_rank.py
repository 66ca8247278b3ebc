"""One of two ranks: `torchrun ... data_rank.py FOLDER` writes what is said of a file that the second's machine has otherwise."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tunedock.errors import DataError
from tunedock.events import Emitter
from tunedock.model import world
from tunedock.recipe.schema import Recipe
from tunedock.run.pulse import Pulse
from tunedock.run.record import Run
from tunedock.run.stop import StopRequest
from tunedock.train.data_record import DataRecord, require_same_data
from tunedock.train.training import Training


def main(folder: Path) -> None:
    recipe = Recipe.model_validate({"model": "x", "data": {"train": "rows.jsonl"}})
    with world.joined(timeout_s=30) as own:
        training = Training(Run(folder), recipe, Emitter(None), StopRequest(), False, own, None, Pulse())

        def said_of(*hashes: str) -> str:
            files = {"rows.jsonl": hashes[own.number], "more.jsonl": "same"}
            try:
                require_same_data(training, DataRecord(hashes[own.number], files, {}, {}, [], False, 8, 1.0, 1.0))
            except DataError as error:
                return f"{error.message} | {error.where}"
            return "the same"

        said = [said_of("one", "one"), said_of("one", "other")]
    (folder / f"{own.number}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
