"""Recipes that cannot be: the message names the key, the value, the place and the way out."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunedock.errors import NotBuiltError, RecipeError
from tunedock.recipe.adapters import Full, Lora
from tunedock.recipe.load import load
from tunedock.recipe.schema import NOT_BUILT

HEAD = "model: Qwen/Qwen3-8B\ndata: {train: rows.jsonl}\n"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refused(tmp_path: Path, text: str, *overrides: str) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        load([write(tmp_path, text)], overrides)
    assert caught.value.exit_code == 2
    return caught.value


def test_a_whole_recipe(tmp_path: Path) -> None:
    loaded = load([write(tmp_path, HEAD + "adapter: {r: 8}\ntrain: {learning_rate: 2e-4}\n")], ["train.seed=7"])
    assert loaded.recipe.adapter == Lora(r=8)
    assert loaded.recipe.train.learning_rate == 2e-4
    assert loaded.recipe.data.train[0].path == "rows.jsonl"
    assert str(loaded.origin(("train", "seed"))) == "command line"
    assert str(loaded.origin(("train", "learning_rate"))).endswith("recipe.yaml:4")
    assert loaded.origin(("train", "optim")) is None


def test_overrides_alone_make_a_recipe() -> None:
    assert load([], ["model=a/b", "data.train=x.jsonl", "adapter=full"]).recipe.adapter == Full()
    with pytest.raises(RecipeError, match="no recipe"):
        load([])


ONE_PROBLEM = {
    "typo": ("train: {learning_rat: 1}", "`train.learning_rat` is not a key", "`train.learning_rate`"),
    "typo in a list": ("data: {train: [a, {path: b, fromat: text}]}", "`data.train.1.fromat`", "`data.train.1.format`"),
    "wrong section": ("learning_rate: 1", "`learning_rate` is not a key", "`train.learning_rate`"),
    "wrong section 2": ("train: {max_length: 1}", "`train.max_length`", "`data.max_length`"),
    "LLaMA-Factory": ("cutoff_len: 1", "`cutoff_len`", "`cutoff_len` is LLaMA-Factory's word; here it is `data.max_length`"),
    "LLaMA-Factory 2": ("lora_rank: 8", "`lora_rank`", "`adapter.r`"),
    "LLaMA-Factory 3": ("train: {val_size: 0.1}", "`train.val_size`", "`data.split.validation`"),
    "LLaMA-Factory 4": ("template: qwen", "`template`", "leave it out"),
    "axolotl": ("micro_batch_size: 2", "`micro_batch_size`", "axolotl's word; here it is `train.batch_size`"),
    "TRL": ("train: {max_seq_length: 2}", "`train.max_seq_length`", "TRL's word; here it is `data.max_length`"),
    "plain word": ("lr: 1", "`lr`", "`train.learning_rate`"),
    "nothing near": ("train: {xyzzy: 1}", "`train.xyzzy`", "the keys of `train` are output_dir"),
    "dotted key in a file": ("train.seed: 1", "`train.seed` is not a key", "nested"),
    "another kind's key": ("adapter: {kind: full, r: 8}", "`adapter.r`", "belongs to `adapter.kind: lora`"),
    "unknown objective": ("objective: sftt", "`objective.kind: sftt` should be sft, pretrain, ", "`sft`"),
    "another objective's key": ("objective: {beta: 0.2}", "`objective.beta`", "belongs to `objective.kind: dpo or orpo or "),
    "objective is a list": ("objective: [dpo]", '`objective: ["dpo"]` should be a mapping', "objective: dpo"),
    "a loss is no objective": ("objective: ipo", "`objective.kind` has no `ipo`", "`objective: {kind: dpo, loss_type: ipo}`"),
    "an objective is no loss": ("objective: {kind: dpo, loss_type: orpo}", "loss_type` has no `orpo`", "`objective: orpo`"),
    "TRL's SFT term": ("objective: {kind: dpo, rpo_alpha: 1.0}", "`objective.rpo_alpha`", "`objective.sft_weight`"),
    "no beta": ("objective: {kind: dpo, beta: 0}", "`objective.beta: 0` should be a number above 0", None),
    "smoothed to nothing": ("objective: {kind: dpo, label_smoothing: 0.5}", "should be a number below 0.5", None),
    "LLaMA-Factory 5": ("pref_beta: 0.2", "`pref_beta`", "`objective.beta`"),
    "TRL 2": ("train: {beta: 0.2}", "`train.beta`", "TRL's word; here it is `objective.beta`"),
    "axolotl 2": ("rl_beta: 0.2", "`rl_beta`", "`objective.beta`"),
    "unknown kind": ("adapter: loar", "`adapter.kind: loar` should be lora, full or freeze", "`lora`"),
    "kind is no text": ("adapter: {kind: [lora]}", "`adapter.kind", None),
    "adapter is a list": ("adapter: [lora]", '`adapter: ["lora"]` should be a mapping', "adapter: lora"),
    "text for a number": ("train: {seed: seven}", "`train.seed: seven` should be a whole number", None),
    "quoted number": ("train: {batch_size: '16'}", '`train.batch_size: "16"`', "without quotes"),
    "half a step": ("train: {save_steps: 5.5}", "`train.save_steps: 5.5` should be a whole number", None),
    "whole float": ("train: {max_steps: 1e4}", "`train.max_steps: 10000.0`", "write 10000"),
    "boolean for a number": ("adapter: {r: true}", "`adapter.r: true` should be a whole number", None),
    "number for a boolean": ("offline: 1", "`offline: 1` should be true or false", None),
    "old boolean": ("offline: yes", "`offline: yes`", "true and false"),
    "negative": ("train: {learning_rate: -1}", "`train.learning_rate: -1` should be a number above 0", None),
    "infinite": ("train: {learning_rate: .inf}", "`train.learning_rate: Infinity` should be a finite number", None),
    "above one": ("adapter: {dropout: 1.5}", "should be a number of at most 1", None),
    "null": ("train: {seed: null}", "`train.seed: null`", "leave out `train.seed`"),
    "number for text": ("hub: 5", "`hub: 5` should be text", "quotes"),
    "mixed list": ("adapter: {target_modules: [q_proj, 3]}", "`adapter.target_modules.1: 3` should be text", "quotes"),
    "no list": ("adapter: {target_modules: 3}", "`adapter.target_modules: 3` should be text or a list", "quotes"),
    "empty list": ("data: {train: []}", "`data.train: []` should be a list of at least 1", None),
    "source is a number": ("data: {train: [3]}", "`data.train.0: 3` should be a mapping", None),
    "data is a file": ("data: rows.jsonl", "`data: rows.jsonl` should be a mapping", "data: {train: rows.jsonl}"),
    "data says nothing": ("data:", "`data` is missing", "data: {train: rows.jsonl}"),
    "train is a list": ("train: [1]", "`train: [1]` should be a mapping", None),
}  # fmt: skip


@pytest.mark.parametrize(("text", "message", "hint"), ONE_PROBLEM.values(), ids=ONE_PROBLEM.keys())
def test_one_problem(tmp_path: Path, text: str, message: str, hint: str | None) -> None:
    head = "model: Qwen/Qwen3-8B\n" if text.startswith("data") else HEAD
    error = refused(tmp_path, head + text + "\n")
    assert message in error.message
    assert hint is None or hint in str(error.hint)
    assert str(error.where).endswith(f"recipe.yaml:{head.count(chr(10)) + 1}")


def test_all_problems_at_once(tmp_path: Path) -> None:
    error = refused(tmp_path, "train:\n  seed: x\n  lr: 1\n\nobjetive: sft\n", "eval.batch_size=0")
    assert "5 problems" in error.message or "6 problems" in error.message
    for part in ("recipe.yaml:2: `train.seed: x`", "recipe.yaml:3: `train.lr`", "recipe.yaml:5: `objetive`",
                 "command line: `eval.batch_size: 0`", "`model` is missing", "`data` is missing"):  # fmt: skip
        assert part in error.message


def test_every_word_of_a_llama_factory_recipe_is_answered(tmp_path: Path) -> None:
    error = refused(
        tmp_path,
        "model_name_or_path: x\nstage: sft\ndo_train: true\nfinetuning_type: lora\nlora_rank: 8\nlora_target: all\n"
        "dataset: identity\ntemplate: llama3\ncutoff_len: 2048\nmax_samples: 1000\noutput_dir: saves\nplot_loss: true\n"
        "overwrite_output_dir: true\nper_device_train_batch_size: 1\nlearning_rate: 1.0e-4\nval_size: 0.1\nbf16: true\n"
        "preprocessing_num_workers: 16\neval_strategy: steps\nddp_timeout: 180000000\nwarmup_ratio: 0.1\n",
    )
    unanswered = [line for line in error.message.splitlines() if "the keys of a recipe are" in line]
    assert not unanswered
    assert error.message.count("hint:") == error.message.count("recipe.yaml:")
    assert "`tunedock recipe import" in str(error.hint), "the one way out of them all"
    assert "tunedock recipe import" not in str(refused(tmp_path, "cutoff_len: 2\ntemplate: qwen\n").hint)


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in NOT_BUILT.items() for value in values or (None,)]
)
def test_what_is_not_built_is_refused_by_name(tmp_path: Path, key: str, value: str | None) -> None:
    with pytest.raises(NotBuiltError) as caught:
        load([write(tmp_path, HEAD)], [f"{key}={value or '{x: 1}'}"])
    assert "not built yet" in caught.value.message
    assert (f"`{key}: {value}`" if value else f"`{key}`") in caught.value.message
    assert "problems" not in caught.value.message, "one fault is told once"


def test_not_built_says_what_there_is_today(tmp_path: Path) -> None:
    error = refused(tmp_path, HEAD + "launch: {on: kubernetes}\n")
    assert error.message == "`launch.on: kubernetes` is not built yet (today: local, docker, compose)"
    assert str(error.where).endswith("recipe.yaml:3")


def test_report_to_takes_a_list_or_a_word(tmp_path: Path) -> None:
    for text, expected in {"tensorboard": ["tensorboard"], "none": [], "[]": []}.items():
        assert load([write(tmp_path, HEAD)], [f"train.report_to={text}"]).recipe.train.report_to == expected
