"""A model's shape without its weights: what ranks begin with that get them from the first one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from families import save_tiny
from tunedock import pipeline
from tunedock.model.adapter import trainable_state
from tunedock.model.fused import find_parts, fuse
from tunedock.model.load import CPU
from tunedock.model.policy import Precision
from tunedock.model.session import find_base, trainable_model
from tunedock.recipe.schema import Recipe

FLOAT32 = Precision(torch.float32, torch.float32)
LORA = "{kind: lora, r: 4, alpha: 8"

SHAPES = [
    ("qwen3", "full", {}),
    ("llama3", f"{LORA}}}", {}),
    ("gemma", f"{LORA}}}", {}),  # buffers, tied weights
    ("qwen3", "{kind: freeze, last_n_layers: 1}", {}),
    ("qwen3", f"{LORA}, use_dora: true}}", {}),
    ("qwen3", f"{LORA}, init_lora_weights: pissa}}", {}),
    ("qwen3", f"{LORA}, init_lora_weights: olora}}", {}),
    ("qwen3", f"{LORA}, modules_to_save: [lm_head, embed_tokens]}}", {}),
    ("qwen3", f"{LORA}}}", {"add_tokens": ["<one>", "<two>"]}),
    ("qwen3", "full", {"add_tokens": ["<one>", "<two>"]}),
    ("qwen3", "full", {"init": "random"}),
]


def recipe(folder: Path, family: str, adapter: str, objective: str = "sft", **model: object) -> Recipe:
    save_tiny(family, folder / "base")
    (folder / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}))
    (folder / "recipe.yaml").write_text(
        f"model: {json.dumps({'path': './base', **model})}\nobjective: {objective}\nadapter: {adapter}\noffline: true\n"
        "data: {train: rows.jsonl}\ntrain: {bf16: false}\n"
    )
    return Recipe.model_validate(pipeline.resolve_recipe([folder / "recipe.yaml"]).recipe.model_dump())


def ties(model: nn.Module) -> list[list[str]]:
    """Names that lead to one parameter."""
    found: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), []).append(name)
    return sorted(sorted(names) for names in found.values())


def assert_same_shape(empty: nn.Module, whole: nn.Module) -> None:
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert not any(parameter.is_meta for parameter in whole.parameters())
    told = [
        {name: (p.shape, p.requires_grad, p.dtype) for name, p in model.named_parameters()} for model in (empty, whole)
    ]
    assert told[0] == told[1]
    assert ties(empty) == ties(whole)
    buffers = dict(whole.named_buffers())
    assert buffers.keys() == dict(empty.named_buffers()).keys()
    for name, buffer in empty.named_buffers():
        assert buffer.shape == buffers[name].shape
        assert torch.equal(buffer, buffers[name]) if not buffer.is_meta else "trainable_tokens" in name, name


@pytest.mark.parametrize(("family", "adapter", "model"), SHAPES)
def test_it_has_the_shape_of_the_model_that_is_loaded(
    tmp_path: Path, family: str, adapter: str, model: dict[str, object]
) -> None:
    base = find_base(recipe(tmp_path, family, adapter, **model))
    empty = trainable_model(base, FLOAT32, CPU, empty=True)
    assert_same_shape(empty, trainable_model(base, FLOAT32, CPU))


def test_of_a_reward_model_too(tmp_path: Path) -> None:
    base = find_base(recipe(tmp_path, "qwen3", f"{LORA}}}", objective="reward"))
    assert_same_shape(trainable_model(base, FLOAT32, CPU, empty=True), trainable_model(base, FLOAT32, CPU))


@pytest.mark.parametrize("kind", ["pissa", "plain"])
def test_a_run_that_goes_on_begins_with_its_shape(tmp_path: Path, kind: str) -> None:
    """`began.safetensors` is read by every rank; what PiSSA takes out of the base, the first one takes out."""
    init = "true" if kind == "plain" else kind
    base = find_base(recipe(tmp_path, "qwen3", f"{LORA}, init_lora_weights: {init}}}"))
    began = trainable_state(trainable_model(base, FLOAT32, CPU))
    empty = trainable_model(base, FLOAT32, CPU, began=began, empty=True)
    assert_same_shape(empty, trainable_model(base, FLOAT32, CPU, began=began))


def test_an_adapter_that_is_gone_on_with(tmp_path: Path) -> None:
    base = find_base(recipe(tmp_path, "qwen3", f"{LORA}}}"))
    trainable_model(base, FLOAT32, CPU).save_pretrained(str(tmp_path / "before"))  # type: ignore[operator]
    again = find_base(recipe(tmp_path, "qwen3", f"{{kind: lora, continue_from: {tmp_path / 'before'}}}"))
    assert_same_shape(trainable_model(again, FLOAT32, CPU, empty=True), trainable_model(again, FLOAT32, CPU))


def test_merged_adapters_change_no_shape(tmp_path: Path) -> None:
    base = find_base(recipe(tmp_path, "qwen3", f"{LORA}}}"))
    trainable_model(base, FLOAT32, CPU).save_pretrained(str(tmp_path / "before"))  # type: ignore[operator]
    again = find_base(recipe(tmp_path, "qwen3", "full", adapters=[str(tmp_path / "before")]))
    assert_same_shape(trainable_model(again, FLOAT32, CPU, empty=True), trainable_model(again, FLOAT32, CPU))


def test_what_is_fused_is_told_and_not_tried(tmp_path: Path) -> None:
    base = find_base(recipe(tmp_path, "qwen3", f"{LORA}}}"))
    whole = trainable_model(base, FLOAT32, CPU)
    parts = json.loads(json.dumps(find_parts(whole)))
    empty = trainable_model(base, FLOAT32, CPU, empty=True)
    assert fuse(empty, parts) == fuse(whole)
    replaced = [{name for name, m in model.named_modules() if "forward" in vars(m)} for model in (empty, whole)]
    assert replaced[0] == replaced[1] != set()
