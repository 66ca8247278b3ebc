"""What is left out is filled in, with its origin; paths; the hash; a resolved recipe reads back the same."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tunedock import __version__
from tunedock.errors import RecipeError
from tunedock.recipe.adapters import Lora
from tunedock.recipe.load import load
from tunedock.recipe.resolve import Resolved, json_schema, resolve
from tunedock.recipe.schema import Recipe

NOW = datetime(2025, 1, 31, 9, 30)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "recipe.yaml").write_text("model: Qwen/Qwen3-8B\ndata: {train: rows.jsonl}\n")
    return tmp_path


def resolved(folder: Path, *overrides: str, cwd: Path | None = None) -> Resolved:
    return resolve(load([folder / "recipe.yaml"], overrides), now=NOW, cwd=cwd or folder)


@pytest.mark.parametrize("key", ["data.train", "model", "train.output_dir", "model.chat_template"])
def test_a_path_that_no_disk_takes_is_told(folder: Path, key: str) -> None:
    with pytest.raises(RecipeError, match="cannot be looked up: File name too long"):
        resolved(folder, f"{key}={'a' * 5000}")


def test_defaults_and_derived_values(folder: Path) -> None:
    result = resolved(folder, "adapter.r=8", "train.eval_strategy=steps")
    recipe, origins = result.recipe, result.origins
    assert recipe.adapter == Lora(r=8, alpha=16.0)
    assert origins["adapter.alpha"] == "derived: twice adapter.r"
    assert origins["adapter.r"] == "command line"
    assert origins["model.path"] == f"{folder}/recipe.yaml:1"
    assert origins["train.optim"] == origins["train.batch_size"] == "default"
    assert (recipe.train.batch_size, recipe.train.learning_rate, recipe.train.eval_steps) == (16, 1e-4, 500)
    assert recipe.train.output_dir == f"{folder}/runs/20250131-093000-sft-Qwen3-8B"
    assert recipe.train.bf16 is None and recipe.train.token_budget is None, "these depend on the device"
    assert result.version == __version__


FILLED: list[tuple[tuple[str, ...], str, Any, str]] = [
    (("adapter=full",), "train.learning_rate", 1e-5, "derived: adapter.kind full"),
    (("adapter=full", "model.init=random", "objective=pretrain"), "train.learning_rate", 1e-3, "derived: model.init random"),
    (("objective=dpo",), "train.learning_rate", 1e-5, "derived: objective.kind dpo, adapter.kind lora"),
    (("objective=dpo", "adapter=full"), "train.learning_rate", 1e-6, "derived: objective.kind dpo, adapter.kind full"),
    (("objective=dpo",), "objective.kind", "dpo", "command line"),
    (("objective=dpo", "objective.beta=0.3"), "objective.beta", 0.3, "command line"),
    (("objective.kind=dpo", "objective.beta=0.3"), "objective.kind", "dpo", "command line"),
    (("objective.beta=0.3", "objective.kind=dpo"), "objective.beta", 0.3, "command line"),
    ((), "objective.kind", "sft", "default"),
    (("train.per_device_train_batch_size=4", "train.gradient_accumulation_steps=3"), "train.batch_size", 12, "derived: "),
    (("train.per_device_train_batch_size=4",), "train.batch_size", 4, "derived: "),
    (("data.split.validation=0.05",), "data.split.train", 0.85, "derived: "),
    (("data.split.validation=0.15", "data.split.test=0"), "data.split.train", 0.85, "derived: "),
    (("data.validation=rows.jsonl",), "data.split.validation", 0.0, "derived: data.validation gives the files"),
    (("data.validation=rows.jsonl",), "data.split.train", 0.9, "derived: "),
    (("data.split={validation: 0, test: 0}",), "train.eval_strategy", "no", "derived: there is no validation data"),
    (("data.split={validation: 0, test: 0}",), "data.split.train", 1.0, "derived: "),
    (("adapter.alpha=4",), "adapter.alpha", 4.0, "command line"),
]  # fmt: skip


DEVICES = [
    ((), 0, 12, "1 device"),
    ((), 8, 96, "8 devices"),
    (("launch.processes=2",), 8, 24, "2 devices"),
    (("launch.nodes=2", "launch.rendezvous=a:1"), 4, 96, "8 devices"),
]


@pytest.mark.parametrize(("overrides", "gpus", "size", "said"), DEVICES)
def test_a_devices_batch_is_taken_by_each(
    folder: Path, overrides: tuple[str, ...], gpus: int, size: int, said: str
) -> None:
    each = ("train.per_device_train_batch_size=4", "train.gradient_accumulation_steps=3")
    loaded = load([folder / "recipe.yaml"], [*each, *overrides])
    result = resolve(loaded, cwd=folder, gpus=lambda: gpus)
    assert result.recipe.train.batch_size == size
    assert result.origins["train.batch_size"].endswith(f"gradient_accumulation_steps x {said}")
    whole = [f"train.batch_size={size}", *each, *overrides]
    assert resolve(load([folder / "recipe.yaml"], whole), cwd=folder, gpus=lambda: gpus).recipe.train.batch_size == size
    with pytest.raises(RecipeError, match="times the processes"):
        resolve(
            load([folder / "recipe.yaml"], [f"train.batch_size={size + 1}", *whole[1:]]), cwd=folder, gpus=lambda: gpus
        )


def test_gpus_are_looked_for_only_where_they_matter(folder: Path) -> None:
    def asked() -> int:
        raise AssertionError("nvidia-smi takes a moment")

    assert resolve(load([folder / "recipe.yaml"]), cwd=folder, gpus=asked).recipe.launch.processes is None


def test_an_engine_is_for_one_process_however_many_gpus_there_are(folder: Path) -> None:
    engine = "{kind: openai, base_url: 'http://x/v1', model: m}"
    given = [f"objective={{kind: grpo, rewards: [exact_match], engine: {engine}}}"]
    with pytest.raises(RecipeError, match="given the whole adapter by one process"):
        resolve(load([folder / "recipe.yaml"], given), cwd=folder, gpus=lambda: 2)
    resolve(load([folder / "recipe.yaml"], [*given, "launch.processes=1"]), cwd=folder, gpus=lambda: 2)


@pytest.mark.parametrize(("overrides", "key", "value", "origin"), FILLED)
def test_filled_in(folder: Path, overrides: tuple[str, ...], key: str, value: Any, origin: str) -> None:
    result = resolved(folder, *overrides)
    found: Any = result.recipe
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value
    assert result.origins[key].startswith(origin)


@pytest.mark.parametrize(
    "overrides",
    [
        ("data.split.train=0.95",),
        ("data.split={train: 0.5, validation: 0.2}",),
        ("data.split={validation: 0.7, test: 0.5}",),
    ],
)
def test_shares_that_cannot_be_completed_are_refused(folder: Path, overrides: tuple[str, ...]) -> None:
    with pytest.raises(RecipeError, match="add up to 1"):
        resolved(folder, *overrides)


def test_a_best_model_without_validation_data_is_refused_not_turned_off(folder: Path) -> None:
    with pytest.raises(RecipeError, match="needs validation data"):
        resolved(folder, "data.split={validation: 0, test: 0}", "train.load_best_model_at_end=true")


def test_every_leaf_has_an_origin(folder: Path) -> None:
    result = resolved(folder, "data.train.0.columns={a: b}", "model.config_overrides={}")

    def count(value: Any) -> int:
        if isinstance(value, dict) and value:
            return sum(count(child) for child in value.values())
        if isinstance(value, list) and any(isinstance(item, dict) for item in value):
            return sum(count(child) for child in value)
        return 1

    assert len(result.origins) == count(result.to_json()["recipe"])
    assert result.origins["data.train.0.columns.a"] == "command line"
    assert result.origins["data.train.0.format"] == "default"


# Paths


def test_paths_start_where_they_were_written(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "own.jsonl").write_text("{}")
    (elsewhere / "sub").mkdir()
    result = resolved(folder, "data.validation=own.jsonl", "train.output_dir=sub/../out", cwd=elsewhere)
    assert result.recipe.data.train[0].path == str(folder / "rows.jsonl")
    assert result.recipe.data.validation[0].path == str(elsewhere / "own.jsonl")
    assert result.recipe.train.output_dir == str(elsewhere / "out")


def test_a_relative_recipe_gives_absolute_paths(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    result = resolve(load([Path("recipe.yaml")]))
    assert result.recipe.data.train[0].path == str(folder / "rows.jsonl")
    assert result.origins["model.path"] == "recipe.yaml:1"


KEPT = ["tatsu-lab/alpaca", "s3://bucket/rows.jsonl", "https://example.com/rows.csv.gz", "memory://rows.jsonl"]


@pytest.mark.parametrize("path", KEPT)
def test_hub_ids_and_urls_are_kept(folder: Path, path: str) -> None:
    assert resolved(folder, f"data.train={path}").recipe.data.train[0].path == path


def test_a_folder_comes_before_a_hub_id_of_its_name(folder: Path) -> None:
    (folder / "Qwen" / "Qwen3-8B").mkdir(parents=True)
    assert resolved(folder).recipe.model.path == str(folder / "Qwen" / "Qwen3-8B")


def test_globs_and_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    result = resolved(folder, "data.train=['more/**/*.jsonl', ~/rows.jsonl]", "data.cache_dir=~/cache")
    assert [source.path for source in result.recipe.data.train] == [f"{folder}/more/**/*.jsonl", f"{folder}/rows.jsonl"]
    assert result.recipe.data.cache_dir == f"{folder}/cache"


MISSING = {
    "./nope": "there is no",
    "../nope": "there is no",
    "/nope/at/all": "there is no",
    "~/certainly/not/here": "there is no",
    "nope.jsonl": "there is no",
    "data/nope.csv.gz": "there is no",
    "a/b/c": "there is no",
    "gpt2": "owner/name",
    "row.jsonl": "did you mean `rows.jsonl`",
    "''": "no path",
    '"a\\0b"': "no path",
    "~nobody-of-this-name/x": "no such user",
}


@pytest.mark.parametrize(("path", "message"), MISSING.items())
def test_paths_that_lead_nowhere(folder: Path, path: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        resolved(folder, f"data.train={path}")
    assert message in str(caught.value)
    assert "data.train.0.path" in caught.value.message


def test_a_path_that_was_meant_from_the_working_directory(folder: Path) -> None:
    (folder / "recipes").mkdir()
    (folder / "data" / "v").mkdir(parents=True)
    (folder / "recipes" / "r.yaml").write_text("model: a/b\ndata: {train: rows.jsonl, validation: data/v}\n")
    with pytest.raises(RecipeError) as caught:
        resolve(load([folder / "recipes" / "r.yaml"]), cwd=folder)
    assert caught.value.message.count("this one is in the working directory") == 2
    assert "2 problems" in caught.value.message


def test_a_template_must_be_a_file_here(folder: Path) -> None:
    for path in ("https://example.com/t.jinja", "owner/name"):
        with pytest.raises(RecipeError, match="chat_template"):
            resolved(folder, f"model.chat_template={path}")


def test_a_run_directory_is_local(folder: Path) -> None:
    with pytest.raises(RecipeError, match="local path"):
        resolved(folder, "train.output_dir=s3://bucket/run")


# Hash, YAML, JSON


def test_the_hash_follows_what_affects_the_result(folder: Path) -> None:
    base = resolved(folder).hash
    assert len(base) == 16 and int(base, 16) >= 0
    for same in ("train.output_dir=elsewhere", "train.report_to=none", "train.logging_steps=5", "eval.max_samples=3",
                 "train.batch_size=16", "train.per_device_train_batch_size=16", "train.num_train_epochs=3",
                 "adapter.alpha=32", "data.cache_dir=c", "hub=modelscope", "parallel=fsdp", "launch.processes=8"):  # fmt: skip
        assert resolved(folder, same).hash == base, same
    others = {resolved(folder, other).hash for other in (
        "train.seed=7", "train.batch_size=8", "adapter.r=8", "model.revision=x", "data.max_length=100", "adapter=full",
        "data.split.seed=1", "train.num_train_epochs=2")}  # fmt: skip
    assert len(others) == 8 and base not in others


def test_yaml_reads_back_the_same(folder: Path) -> None:
    first = resolved(folder, "data.system='a: #b\n c'", "data.train.0.columns={x: 'on'}", "adapter.target_modules=[q, v]",
                     "train.per_device_train_batch_size=2", "data.validation=rows.jsonl")  # fmt: skip
    text = first.to_yaml()
    assert "# derived: twice adapter.r" in text and "output_dir" not in text
    (folder / "again.yaml").write_text(text, encoding="utf-8")
    second = resolve(load([folder / "again.yaml"]), now=NOW, cwd=folder)
    assert second.recipe == first.recipe and second.hash == first.hash


MARKS = st.text("?:-#,[]{}&*!|>%@`'\"~= a1.\n\\", max_size=6)
"""What YAML gives a meaning to."""


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.text(max_size=40) | MARKS, st.floats(1e-30, 1e30), st.lists(st.text(max_size=10) | MARKS, max_size=3))
@example("?", 1e-4, ["?q", ": v", ":"])
def test_yaml_reads_back_any_value(folder: Path, text: str, rate: float, words: list[str]) -> None:
    values = {"model": "a/b", "data": {"train": "rows.jsonl", "system": text, "max_length": 5},
              "train": {"learning_rate": rate}, "adapter": {"target_modules": words}}  # fmt: skip
    try:
        (folder / "values.yaml").write_text(json.dumps(values), encoding="utf-8")
        first = resolve(load([folder / "values.yaml"]), now=NOW, cwd=folder)
    except RecipeError:  # half a character pair, which JSON can spell
        return
    (folder / "again.yaml").write_text(first.to_yaml(), encoding="utf-8")
    assert resolve(load([folder / "again.yaml"]), now=NOW, cwd=folder).recipe == first.recipe


def test_json_reads_back_the_same(folder: Path) -> None:
    first = resolved(folder, "adapter=full")
    second = Resolved.from_json(json.loads(json.dumps(first.to_json())))
    assert (second.recipe, second.origins, second.hash) == (first.recipe, first.origins, first.hash)


@pytest.mark.parametrize("value", [None, [], {}, {"recipe": {}}, {"recipe": {"model": "x"}, "origins": 3}, "text"])
def test_json_that_is_no_resolved_recipe(value: Any) -> None:
    with pytest.raises(RecipeError, match="no resolved recipe"):
        Resolved.from_json(value)


def test_json_of_a_newer_version_is_named(folder: Path) -> None:
    value = resolved(folder).to_json() | {"version": "99.0"}
    value["recipe"]["new_key"] = 1
    with pytest.raises(RecipeError) as caught:
        Resolved.from_json(value)
    assert "99.0" in str(caught.value.hint)


def test_notes_reach_the_resolved_recipe(folder: Path) -> None:
    assert "warmup_ratio" in resolved(folder, "train.warmup_ratio=0.1").notes[0]


# The schema for editors


def test_json_schema_knows_shorthands_and_descriptions() -> None:
    schema = json_schema()
    assert schema["$schema"].endswith("2020-12/schema")
    assert schema["additionalProperties"] is False
    assert {"type": "string"} in schema["properties"]["model"]["anyOf"]
    assert {"type": "string"} in schema["$defs"]["Data"]["properties"]["train"]["anyOf"]
    assert any("enum" in option for option in schema["properties"]["adapter"]["anyOf"])
    assert "hub id" in schema["$defs"]["Model"]["properties"]["path"]["description"].lower()
    assert json.loads(json.dumps(schema)) == schema
    assert set(schema["properties"]) == set(Recipe.model_fields)
