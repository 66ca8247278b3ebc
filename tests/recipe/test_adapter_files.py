"""adapter_config.json of folders made elsewhere: what is taken from it, and what is refused."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunedock.errors import RecipeError
from tunedock.recipe.adapter_files import _base_name, folder_of, notes_on_base, read_adapter
from tunedock.recipe.load import load
from tunedock.recipe.resolve import Resolved, resolve

PLAIN: dict[str, Any] = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "bias": "none",
    "target_modules": ["v_proj", "q_proj"], "init_lora_weights": True, "megatron_core": "megatron.core", "loftq_config": {},
    "base_model_name_or_path": "org/base", "use_rslora": False, "modules_to_save": None, "qalora_group_size": 16,
}  # fmt: skip


def saved(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**PLAIN, **changes}))
    (folder / "adapter_model.safetensors").write_bytes(b"read by the work plane")
    return folder


def resolved(folder: Path, text: str) -> Resolved:
    (folder / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    recipe = folder / "recipe.yaml"
    recipe.write_text(f"data: {{train: rows.jsonl}}\n{text}")
    return resolve(load([recipe]), cwd=folder)


def test_settings_are_those_of_the_file(tmp_path: Path) -> None:
    found = read_adapter(saved(tmp_path / "a", use_dora=True, rank_pattern={"q_proj": 2}))
    assert found["target_modules"] == ["q_proj", "v_proj"], "PEFT writes a set"
    assert (found["r"], found["use_dora"], found["rank_pattern"]) == (4, True, {"q_proj": 2})
    run = tmp_path / "run"
    saved(run / "model")
    assert folder_of(run) == run / "model"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "IA3"}, "'IA3' is no LoRA"),
        ({"init_lora_weights": "pissa"}, "plain LoRA first"),
        ({"megatron_core": "os"}, "`megatron_core"),
        ({"bias": "all"}, "`bias"),
        ({"layer_replication": [[0, 2]]}, "`layer_replication"),
        ({"use_vera_one_day": True}, "`use_vera_one_day: true` is not known here"),
    ],
)
def test_what_is_not_known_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as error:
        read_adapter(saved(tmp_path / "a", **changes))
    assert said in str(error.value)


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no folder with an adapter"):
        read_adapter(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(RecipeError, match="a run that has no adapter"):
        read_adapter(tmp_path)
    folder = saved(tmp_path / "a")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(RecipeError, match="reading pickle can run code"):
        read_adapter(folder)
    (folder / "adapter_config.json").write_text("[1]")
    (folder / "adapter_model.bin").rename(folder / "adapter_model.safetensors")
    with pytest.raises(RecipeError, match="no object"):
        read_adapter(folder)


def test_a_recipe_takes_the_shape(tmp_path: Path) -> None:
    saved(tmp_path / "a", use_rslora=True)
    found = resolved(tmp_path, "model: org/base\nadapter: {continue_from: a, dropout: 0.2}\n")
    adapter: Any = found.recipe.adapter
    assert (adapter.r, adapter.alpha, adapter.use_rslora, adapter.dropout) == (4, 8.0, True, 0.2)
    assert adapter.target_modules == ["q_proj", "v_proj"] and adapter.continue_from == str(tmp_path / "a")
    assert not found.notes
    again = Resolved.from_json(json.loads(json.dumps(found.to_json())))
    assert again.recipe == found.recipe


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("adapter: {continue_from: a, r: 8}", "`adapter.r: 8`, and the adapter it goes on from has 4"),
        ("adapter: {continue_from: a, target_modules: [q_proj]}", "`adapter.target_modules"),
        ("adapter: {continue_from: a, use_dora: true}", "has null"),
        ("adapter: {continue_from: b}", "`r`"),
        ("adapter: {continue_from: nowhere}", "there is no"),
    ],
)
def test_a_recipe_that_says_otherwise(tmp_path: Path, text: str, said: str) -> None:
    saved(tmp_path / "a")
    saved(tmp_path / "b", r="many")
    with pytest.raises(RecipeError) as error:
        resolved(tmp_path, f"model: org/base\n{text}\n")
    assert said in str(error.value)


def test_the_same_said_again_is_no_conflict(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    text = "adapter: {continue_from: a, r: 4, target_modules: [v_proj, q_proj], modules_to_save: []}"
    assert resolved(tmp_path, f"model: org/base\n{text}\n").recipe.adapter.kind == "lora"


@pytest.mark.parametrize("key", ["adapter: {continue_from: a}", "adapter: full"])
def test_another_base_is_noted(tmp_path: Path, key: str) -> None:
    saved(tmp_path / "a")
    model = "{path: org/other, adapters: [a]}" if "full" in key else "org/other"
    (note,) = resolved(tmp_path, f"model: {model}\n{key}\n").notes
    assert "was trained on org/base" in note and "org/other" in note


def test_names_of_a_base() -> None:
    cached = "/home/me/.cache/huggingface/hub/models--org--Base/snapshots/0123abc"
    assert _base_name(cached) == _base_name("org/base") == _base_name("/models/base/") == "base"
    assert notes_on_base(Path("a"), "org/base", cached) == notes_on_base(Path("a"), "x", None) == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from([*PLAIN, "trainable_token_indices", "rank_pattern"]), JSON, max_size=4))
def test_any_value_is_taken_or_refused_as_ours(tmp_path: Path, changes: dict[str, Any]) -> None:
    saved(tmp_path / "a", **changes)
    with suppress(RecipeError):
        resolved(tmp_path, "model: org/base\nadapter: {continue_from: a}\n")
