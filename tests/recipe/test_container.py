"""Keys of `launch.container`: what may stand there, and what is said where it may not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tunedock.errors import RecipeError
from tunedock.recipe.container import Container, size_bytes
from tunedock.recipe.load import load
from tunedock.recipe.resolve import resolve


@pytest.mark.parametrize(
    ("text", "size"), [("512m", 512 << 20), ("8g", 8 << 30), ("8G", 8 << 30), ("1024", 1024), ("64k", 65536)]
)
def test_sizes_are_those_of_docker(text: str, size: int) -> None:
    assert size_bytes(text) == size
    assert Container(memory=text).memory == text


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"memory": "8 gigs"}, "512m or 8g"),
        ({"memory": "0g"}, "512m or 8g"),
        ({"shm_size": "big"}, "512m or 8g"),
        ({"gpus": 0}, "greater than 0"),
        ({"cpus": 1e-9}, "0.01"),  # an engine takes it, and limits nothing
        ({"mps": 101}, "less than or equal to 100"),
        ({"user": "ann"}, "1000:1000"),
        ({"ulimits": {"files": 1}}, "no limit `files`"),
        ({"env": ["1A=b"]}, "`NAME=value`"),
        ({"env": ["HF_TOKEN=hf_abc"]}, "`HF_TOKEN` alone"),
        ({"env": ["DB_PASSWORD=x"]}, "alone"),
        ({"network": "a b"}, "pattern"),
        ({"memry": "8g"}, "Extra inputs"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(ValidationError, match=word):
        Container.model_validate(settings)


def test_gpus_are_all_some_or_named() -> None:
    for asked in ("auto", "all", "none", 2, [0, 1], ["GPU-5ab"]):
        assert Container.model_validate({"gpus": asked}).gpus == asked


def test_a_secret_is_named_and_stays_outside() -> None:
    assert Container(env=["HF_TOKEN", "A=b=c"]).env == ["HF_TOKEN", "A=b=c"]


def test_a_secret_that_is_refused_is_not_told(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    file = tmp_path / "r.yaml"
    file.write_text("model: a/b\ndata: {train: ./rows.jsonl}\n")
    with pytest.raises(RecipeError) as caught:
        load([file], ["launch.container.env=[MY_TOKEN=s3cret]"])
    assert "MY_TOKEN=***" in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_mounts_start_from_the_recipes_folder_and_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "extra").mkdir()
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "m").mkdir()
    file = tmp_path / "r.yaml"
    text = "model: ./m\ndata: {train: ./rows.jsonl}\nlaunch: {on: docker, container: {mounts: [./extra]}}\n"
    file.write_text(text)
    found = resolve(load([file])).recipe.launch.container.mounts
    assert [mount.path for mount in found] == [str(tmp_path / "extra")]
    file.write_text(text.replace("./extra", "./missing"))
    with pytest.raises(RecipeError, match=r"launch.container.mounts.0.path"):
        resolve(load([file]))


def test_where_a_run_is_made_does_not_change_what_it_trains(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    file = tmp_path / "r.yaml"
    file.write_text("model: a/b\ndata: {train: ./rows.jsonl}\n")
    there = resolve(load([file], ["launch.on=docker", "launch.image=x", "launch.container.cpus=2"]))
    assert there.hash == resolve(load([file])).hash
