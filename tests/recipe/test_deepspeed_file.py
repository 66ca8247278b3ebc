"""A DeepSpeed JSON of the user's own says the stage and the offloading; the recipe says the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tunedock.errors import RecipeError
from tunedock.recipe.load import load
from tunedock.recipe.resolve import Resolved, resolve

CPU = {"device": "cpu"}
SAID: list[tuple[dict[str, Any], str, str]] = [
    ({}, "ddp", "none"),
    ({"zero_optimization": {"stage": 1}}, "zero1", "none"),
    ({"zero_optimization": {"stage": 2, "offload_optimizer": CPU}}, "zero2", "optimizer"),
    ({"zero_optimization": {"stage": 3, "offload_optimizer": CPU, "offload_param": CPU}}, "zero3", "all"),
    (
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "none"}}, "bf16": {"enabled": "auto"}},
        "zero3",
        "none",
    ),
]


def resolved(folder: Path, value: Any, *overrides: str) -> Resolved:
    (folder / "ds.json").write_text(value if isinstance(value, str) else json.dumps(value))
    (folder / "rows.jsonl").write_text('{"text": "a"}\n')
    (folder / "recipe.yaml").write_text("model: a/b\ndata: {train: rows.jsonl}\ntrain: {deepspeed: ds.json}\n")
    return resolve(load([folder / "recipe.yaml"], overrides), cwd=folder)


@pytest.mark.parametrize(("value", "parallel", "offload"), SAID)
def test_stage_and_offloading_are_read(tmp_path: Path, value: dict[str, Any], parallel: str, offload: str) -> None:
    found = resolved(tmp_path, value)
    assert (found.recipe.parallel, found.recipe.offload) == (parallel, offload)
    assert found.recipe.train.deepspeed == str(tmp_path / "ds.json")
    assert found.origins["parallel"] == "derived: train.deepspeed"


def test_the_recipe_may_say_the_same_and_nothing_else(tmp_path: Path) -> None:
    two = {"zero_optimization": {"stage": 2}}
    assert resolved(tmp_path, two, "parallel=zero2").recipe.parallel == "zero2"
    with pytest.raises(RecipeError, match="`parallel: fsdp`, and the DeepSpeed file says `zero2`"):
        resolved(tmp_path, two, "parallel=fsdp")


def test_it_does_not_count_in_the_hash(tmp_path: Path) -> None:
    assert resolved(tmp_path, {}).hash == resolved(tmp_path, {"zero_optimization": {"stage": 3}}).hash


def test_rules_hold_for_what_the_file_says(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="ZeRO divides all numbers as one flat list"):
        resolved(tmp_path, {"zero_optimization": {"stage": 2}}, "train.optim=muon")


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "a mapping of DeepSpeed's keys"),
        ({"scheduler": {"type": "WarmupLR"}}, "`scheduler` is the recipe's to say"),
        ({"bf16": {"enabled": True}}, "`bf16` is the recipe's to say"),
        ({"zero_optimization": {"stage": "3"}}, "0, 1, 2 or 3"),
        ({"zero_optimization": 3}, "0, 1, 2 or 3"),
    ],
)
def test_a_file_that_is_none_is_told(tmp_path: Path, value: Any, why: str) -> None:
    with pytest.raises(RecipeError, match=why) as caught:
        resolved(tmp_path, value)
    assert caught.value.where == str(tmp_path / "ds.json")
