"""Shapes of well-known models: as many parameters as their makers say; and where a shape is looked for first."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from tunedock.errors import ModelError
from tunedock.plan.decoder import decoder
from tunedock.plan.shapes import find_shape, known_models
from tunedock.recipe.schema import Model

ROWS: list[dict[str, Any]] = json.loads(files("tunedock.plan").joinpath("shapes.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["ids"][0])
def test_a_shape_has_the_parameters_its_makers_say(row: dict[str, Any]) -> None:
    shape = decoder(row["config"])
    assert shape.known
    assert shape.size == row["parameters"]


def test_an_id_stands_once() -> None:
    names = [name for row in ROWS for name in row["ids"]]
    assert len(names) == len(set(names)) == len(known_models())
    assert all(name.count("/") == 1 for name in names)


def test_a_folder_comes_before_the_cache_and_the_cache_before_what_is_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.chdir(tmp_path)
    model = Model(path="Qwen/Qwen3-8B")
    assert find_shape(model).source == "the shapes of well-known models"
    for number, commit in enumerate(("old", "new")):
        snapshot = tmp_path / "home" / "hub" / "models--Qwen--Qwen3-8B" / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text(json.dumps({"number": number}))
    found = find_shape(model)
    assert found.source == "the hub's cache" and "number" in found.config
    (tmp_path / "Qwen" / "Qwen3-8B").mkdir(parents=True)
    (tmp_path / "Qwen" / "Qwen3-8B" / "config.json").write_text(json.dumps({"hidden_size": 8}))
    changed = Model(path="Qwen/Qwen3-8B", init="random", config_overrides={"hidden_size": 16})
    assert find_shape(changed).config["hidden_size"] == 16


@pytest.mark.parametrize(
    ("text", "why"), [("{", "cannot be read"), ("[]", "holds no object"), (None, "is not known here")]
)
def test_what_tells_no_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, why: str) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "model"
    folder.mkdir()
    if text is not None:
        (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match=why) as raised:
        find_shape(Model(path=str(folder)))
    assert raised.value.hint
