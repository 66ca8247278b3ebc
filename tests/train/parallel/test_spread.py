"""Which way a recipe is spread over its processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from runs import workplace

from tunedock import pipeline
from tunedock.model import world
from tunedock.model.session import find_base
from tunedock.train.parallel import spread


class MemoryOfAGivenSize:
    """In place of the machine's, whose size no test can choose."""

    def __init__(self, size: int) -> None:
        self._size = size

    def free_bytes(self) -> int:
        return self._size


def way(folder: Path, monkeypatch: pytest.MonkeyPatch, *changes: str, free: int = 1 << 40) -> str:
    """As the first of two processes would choose it."""
    monkeypatch.setattr(world, "together", lambda: True)
    monkeypatch.setattr(world, "agree", lambda flag: flag)
    monkeypatch.setattr(spread, "memory_of", lambda device: MemoryOfAGivenSize(free))
    recipe = pipeline.resolve_recipe([folder / "recipe.yaml"], list(changes)).recipe
    return spread.way_of(recipe, find_base(recipe), longest_path=64)


def test_auto_is_whole_where_it_fits_and_else_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = workplace(tmp_path, "sft", "full")
    assert way(folder, monkeypatch) == "ddp"
    assert way(folder, monkeypatch, free=900 << 20) == "fsdp"
    assert way(folder, monkeypatch, "train.optim=adafactor", free=900 << 20) == "fsdp"
    assert way(folder, monkeypatch, "train.fp16=true", free=900 << 20) == "ddp", "float16 cannot be sharded"


def test_one_process_is_alone(tmp_path: Path) -> None:
    recipe = pipeline.resolve_recipe([workplace(tmp_path, "sft") / "recipe.yaml"], ["parallel=zero3"]).recipe
    assert spread.way_of(recipe, find_base(recipe), longest_path=64) == "alone"


@pytest.mark.parametrize(("stage", "wanted"), [(0, "ddp"), (1, "zero1"), (2, "zero2"), (3, "zero3")])
def test_a_deepspeed_file_says_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int, wanted: str
) -> None:
    folder, given = workplace(tmp_path, "sft"), tmp_path / "ds.json"
    content: dict[str, Any] = {"zero_optimization": {"stage": stage}}
    given.write_text(json.dumps(content))
    assert way(folder, monkeypatch, f"train.deepspeed={given}") == wanted
