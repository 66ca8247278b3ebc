"""Overlays and overrides: what wins, and where it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tunedock.errors import RecipeError
from tunedock.recipe.document import parse
from tunedock.recipe.merge import Merge


def merged(*texts: str, overrides: tuple[str, ...] = ()) -> Merge:
    merge = Merge()
    for index, text in enumerate(texts):
        merge.overlay(parse(text, f"{index}.yaml"), Path(f"{index}.yaml"))
    for text in overrides:
        merge.override(text)
    return merge


def test_mappings_merge_lists_and_scalars_replace() -> None:
    merge = merged(
        "train: {seed: 1, optim: a}\nadapter: {target_modules: [a, b]}\n",
        "train:\n  seed: 2\nadapter:\n  target_modules: [c]\n",
    )
    assert merge.result() == {"train": {"seed": 2, "optim": "a"}, "adapter": {"target_modules": ["c"]}}
    assert str(merge.origin(("train", "seed"))) == "1.yaml:2"
    assert str(merge.origin(("train", "optim"))) == "0.yaml:1"
    assert str(merge.origin(("adapter", "target_modules"))) == "1.yaml:4"


WIDENED: list[tuple[str, tuple[str, ...], dict[str, Any]]] = [
    ("adapter: lora", ("adapter.r=8",), {"adapter": {"kind": "lora", "r": 8}}),
    ("model: a/b", ("model.revision=v1",), {"model": {"path": "a/b", "revision": "v1"}}),
    ("model: {path: a/b, revision: v1}", ("model=c/d",), {"model": {"path": "c/d"}}),
    ("model: a/b", ("model.path=c/d",), {"model": {"path": "c/d"}}),
    ("data: {train: a}", ("data.train.0.format=text",), {"data": {"train": [{"path": "a", "format": "text"}]}}),
    ("data: {train: {path: a}}", ("data.train.0.path=b",), {"data": {"train": [{"path": "b"}]}}),
    ("data: {train: [a, {path: b}]}", ("data.train.1.path=c",), {"data": {"train": [{"path": "a"}, {"path": "c"}]}}),
    ("data: {train: [a]}", ("data.train.1=b",), {"data": {"train": [{"path": "a"}, {"path": "b"}]}}),
    ("data: {}", ("data.train.0.path=b",), {"data": {"train": [{"path": "b"}]}}),
    ("train: {seed: 1}", ("train.optim_args=a=1,b=2",), {"train": {"seed": 1, "optim_args": "a=1,b=2"}}),
    ("train:", ("train.seed=3",), {"train": {"seed": 3}}),
    ("eval:\nmodel: x", (), {"model": {"path": "x"}}),
    ("adapter: {kind: lora, r: 8}", ("adapter.kind=full",), {"adapter": {"kind": "full"}}),
    ("adapter: {r: 8}", ("adapter.kind=lora",), {"adapter": {"kind": "lora", "r": 8}}),
    ("adapter: lora", ("adapter={kind: freeze, last_n_layers: 2}",), {"adapter": {"kind": "freeze", "last_n_layers": 2}}),
    ("data: {train: {path: a, columns: {x: y}}}", ("data.train.0.columns.0=z",),
     {"data": {"train": [{"path": "a", "columns": {"x": "y", "0": "z"}}]}}),
    ("model: x", ("offline=true", "train.learning_rate=2e-4", "hub='5'", "data.system="),
     {"model": {"path": "x"}, "offline": True, "train": {"learning_rate": 2e-4}, "hub": "5", "data": {"system": None}}),
]  # fmt: skip


@pytest.mark.parametrize(("text", "overrides", "expected"), WIDENED)
def test_overrides_widen_shorthands(text: str, overrides: tuple[str, ...], expected: dict[str, Any]) -> None:
    assert merged(text, overrides=overrides).result() == expected


def test_a_file_can_widen_a_shorthand_of_another() -> None:
    merge = merged("adapter: lora\nmodel: a/b", "adapter:\n  r: 8\n")
    assert merge.result() == {"adapter": {"kind": "lora", "r": 8}, "model": {"path": "a/b"}}
    assert str(merge.origin(("adapter", "kind"))) == "0.yaml:1"
    assert str(merge.origin(("adapter", "r"))) == "1.yaml:2"
    assert str(merge.origin(("model", "path"))) == "0.yaml:2"


def test_an_overlay_of_another_kind_starts_afresh() -> None:
    assert merged("adapter: {r: 8}", "adapter: {kind: full}").result() == {"adapter": {"kind": "full"}}
    assert merged("adapter: {kind: lora, r: 8}", "adapter: full").result() == {"adapter": {"kind": "full"}}


GRPO = "objective: {kind: grpo, rewards: [a.py:f], num_generations: 4, engine: local, beta: 0.1, epsilon: 0.3}\n"


@pytest.mark.parametrize(
    ("text", "override", "stays", "goes"),
    [
        (GRPO, "objective.kind=ppo", {"rewards", "num_generations", "engine"}, ["beta", "epsilon"]),
        (GRPO, "objective=rloo", {"rewards", "num_generations", "engine", "epsilon"}, ["beta"]),
        (GRPO, "objective=grpo", {"rewards", "num_generations", "engine", "beta", "epsilon"}, []),
        (
            GRPO,
            "objective={kind: ppo, num_generations: 2}",
            {"rewards", "num_generations", "engine"},
            ["beta", "epsilon"],
        ),
        ("objective: {kind: dpo, beta: 0.2, loss_type: ipo}", "objective.kind=kto", {"beta"}, ["loss_type"]),
        ("objective: {kind: dpo, beta: 0.2}", "objective.kind=orpo", set(), ["beta"]),  # another beta
        ("objective: {kind: dpo, beta: 0.2}", "objective.kind=simpo", set(), ["beta"]),
        ("objective: {beta: 0.2}", "objective.kind=simpo", {"beta"}, []),
        ("adapter: {r: 8, alpha: 16}", "adapter=full", set(), ["r", "alpha"]),
        ("adapter: {r: 8}", "adapter.kind=looora", set(), ["r"]),
        ("adapter: {r: 8, alpha: 16}", "adapter=lora", {"r", "alpha"}, []),
    ],
)
def test_a_new_kind_keeps_what_means_the_same_to_it_and_says_what_it_drops(
    text: str, override: str, stays: set[str], goes: list[str]
) -> None:
    merge = merged(text, overrides=(override,))
    ((name, section),) = merge.result().items()
    assert section.keys() - {"kind"} == stays
    left = ", ".join(f"`{key}`" for key in goes)
    assert [note.partition("left behind of ")[2].partition(": ")[2] for note in merge.notes] == ([left] if goes else [])
    for key in stays - {"num_generations"}:
        assert str(merge.origin((name, key))) == "0.yaml:1"
    assert str(merge.origin((name, "kind"))) == "command line"


def test_an_engine_of_another_kind_in_a_later_file() -> None:
    remote = "{kind: openai, base_url: 'http://host/v1', model: m, concurrency: 4}"
    merge = merged(f"objective: {{kind: grpo, engine: {remote}}}", "objective: {engine: local}")
    assert merge.result() == {"objective": {"kind": "grpo", "engine": {"kind": "local"}}}
    assert merge.notes == [
        "1.yaml:1: `objective.engine` is `local` now; left behind of `openai`: `base_url`, `model`, `concurrency`"
    ]


def test_a_replaced_list_forgets_its_lines() -> None:
    merge = merged("data:\n  train:\n    - path: a\n      format: text\n", "data: {train: b}")
    assert str(merge.origin(("data", "train", 0, "format"))) == "1.yaml:1"


def test_the_merge_leaves_its_documents_alone() -> None:
    document = parse("train: {warmup_ratio: 0.1, lr_scheduler_kwargs: {a: 1}}", "r.yaml")
    merge = Merge()
    merge.overlay(document, Path("r.yaml"))
    merge.override("train.lr_scheduler_kwargs.a=2")
    assert document.value == {"train": {"warmup_ratio": 0.1, "lr_scheduler_kwargs": {"a": 1}}}


def test_names_transformers_has_renamed_are_read_and_noted() -> None:
    merge = merged("train:\n  warmup_ratio: 0.1\n  evaluation_strategy: steps\n")
    assert merge.result() == {"train": {"warmup_steps": 0.1, "eval_strategy": "steps"}}
    assert str(merge.origin(("train", "warmup_steps"))) == "0.yaml:2"
    assert len(merge.notes) == 2 and "0.yaml:2" in merge.notes[0] and "warmup_ratio" in merge.notes[0]
    over = merged("train: {warmup_steps: 5}", overrides=("train.warmup_ratio=0.2",))
    assert over.result() == {"train": {"warmup_steps": 0.2}}


@pytest.mark.parametrize("value", ["3", "1.0", "-0.1", "true", "many", ".nan"])
def test_a_warmup_ratio_that_would_turn_into_steps_is_refused(value: str) -> None:
    with pytest.raises(RecipeError, match="share"):
        merged(f"train: {{warmup_ratio: {value}}}")


def test_a_setting_under_both_its_names_is_refused() -> None:
    with pytest.raises(RecipeError, match="one setting"):
        merged("train: {warmup_ratio: 0.1, warmup_steps: 5}")


@pytest.mark.parametrize(
    "override",
    ["recipe.yaml", "=1", "a..b=1", "train.=1", ".a=1", "data.system=@x", "data.train.3.path=x",
     "data.train.path=x", "model.path.x=1", "data.train.-1.path=x"],
)  # fmt: skip
def test_overrides_that_cannot_be_read(override: str) -> None:
    with pytest.raises(RecipeError) as caught:
        merged("model: a/b\ndata: {train: x}", overrides=(override,))
    assert "command line" in str(caught.value.where)
