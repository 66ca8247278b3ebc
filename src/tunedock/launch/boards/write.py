"""Writes the dashboards: `python -m tunedock.launch.boards.write`, or `make boards`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path

from tunedock.launch.boards import serving, training
from tunedock.launch.boards.shape import as_json

FOLDER = Path(__file__).parents[1] / "monitoring/grafana"
BOARDS = {"serving": serving.BOARD, "training": training.BOARD}


@cache
def titles() -> Mapping[str, str]:
    """English -> Chinese, of every text on a board."""
    found: dict[str, str] = json.loads(files("tunedock.launch.boards").joinpath("titles.json").read_text("utf-8"))
    return found


def texts() -> dict[str, str]:
    """File name -> what is in it. Raises KeyError for a text that nobody has translated."""
    found = {}
    for name, board in BOARDS.items():
        found[f"{name}.json"] = as_json(board, str)
        found[f"{name}.zh.json"] = as_json(board, titles().__getitem__, language="zh")
    return {name: json.dumps(value, indent=1, ensure_ascii=False) + "\n" for name, value in found.items()}


def main() -> None:
    for name, text in texts().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(FOLDER / name)


if __name__ == "__main__":
    main()
