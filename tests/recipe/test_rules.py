"""Each row of the table: a recipe that breaks it and no other."""

from __future__ import annotations

from typing import Any

import pytest

from tunedock.errors import RecipeError
from tunedock.recipe.rules import RULES, check
from tunedock.recipe.rules_parallel import why_not_by
from tunedock.recipe.schema import Recipe

GRPO: dict[str, Any] = {"kind": "grpo", "rewards": ["exact_match"]}
RANDOM = {"path": "a/b", "init": "random"}


def engine(settings: dict[str, Any], **adapter: Any) -> dict[str, Any]:
    """A recipe whose answers an engine makes."""
    given = {"kind": "openai", "base_url": "http://localhost:8000/v1", "model": "m", **settings}
    objective = {"kind": "grpo", "rewards": ["exact_match"], "engine": given}
    return {"objective": objective, "adapter": {"kind": "lora", **adapter}}


BROKEN: dict[str, dict[str, Any]] = {
    "freeze-names-nothing": {"adapter": "freeze"},
    "lora-on-random-weights": {"objective": "pretrain", "model": RANDOM, "adapter": "lora"},
    "freeze-on-random-weights": {"model": RANDOM, "adapter": {"kind": "freeze", "last_n_layers": 1}},
    "quantized-weights-do-not-train": {"quantize": "fp8", "adapter": "full"},
    "modules-of-no-layers": {"adapter": {"kind": "freeze", "layer_modules": ["mlp"], "trainable_modules": ["norm"]}},
    "start-in-quantized-weights": {"quantize": "nf4", "adapter": {"init_lora_weights": "pissa_niter_16"}},
    "dora-on-eight-bits": {"quantize": "int8", "adapter": {"use_dora": True}},
    "layers-need-names": {"adapter": {"layers_to_transform": [0]}},
    "starts-twice": {"adapter": {"init_lora_weights": "olora", "continue_from": "saves/x"}},
    "adapters-into-quantized-weights": {"quantize": "nf4", "model": {"path": "a/b", "adapters": ["saves/x"]}},
    "adapters-into-random-weights": {"adapter": "full", "model": {**RANDOM, "adapters": ["saves/x"]}},
    "expression-cannot-be-read": {"adapter": {"rank_pattern": {"*_proj": 8}}},
    "token-named-twice": {"model": {"path": "a/b", "add_tokens": ["<a>"], "add_special_tokens": ["<a>"]}},
    "overrides-of-a-trained-config": {"model": {"path": "a/b", "config_overrides": {"hidden_size": 8}}},
    "two-precisions": {"train": {"bf16": True, "fp16": True}},
    "split-sum": {"data": {"split": {"train": 0.9}}},
    "split-without-training": {"data": {"split": {"train": 0.0, "validation": 0.5, "test": 0.5}}},
    "validation-twice": {"data": {"validation": "v.jsonl", "split": {"validation": 0.1}}},
    "test-twice": {"data": {"test": "t.jsonl", "split": {"test": 0.1}}},
    "streaming-without-end": {"data": {"streaming": True}},
    "no-steps": {"train": {"max_steps": 0}},
    "pretrain-system": {"objective": "pretrain", "data": {"system": "You are kind."}},
    "smoothing-needs-a-label": {"objective": {"kind": "dpo", "loss_type": "ipo", "label_smoothing": 0.1}},
    "kto-of-one": {"objective": "kto", "train": {"batch_size": 1}},
    "exo-needs-smoothing": {"objective": {"kind": "dpo", "loss_type": "exo_pair"}},
    "precompute-a-stream": {
        "objective": {"kind": "dpo", "precompute_ref_log_probs": True},
        "data": {"streaming": True},
        "train": {"max_steps": 10},
    },
    "train-on-without-turns": {"objective": "orpo", "data": {"train_on": "last"}},
    "objective-on-random-weights": {"objective": "reward", "model": RANDOM, "adapter": "full"},
    "cispo-without-a-bound": {"objective": {**GRPO, "loss_type": "cispo"}},
    "reward-range-upside-down": {"objective": {**GRPO, "kind": "rloo", "reward_clip_range": [1.0, -1.0]}},
    "rollout-of-a-stream": {"objective": GRPO, "data": {"streaming": True}, "train": {"max_steps": 10}},
    "rollout-without-room": {"objective": {**GRPO, "max_new_tokens": 2048}},
    "batch-of-parts-of-groups": {"objective": GRPO, "train": {"batch_size": 12}},
    "group-of-one": {"objective": {**GRPO, "num_generations": 1}},
    "engine-without-an-adapter": {
        "objective": {**GRPO, "engine": {"kind": "openai", "base_url": "http://engine.example/v1", "model": "a/b"}},
        "adapter": "full",
    },
    "batch-sizes-differ": {
        "train": {"batch_size": 16, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    },
    "accumulation-alone": {"train": {"gradient_accumulation_steps": 4}},
    "warmup-not-whole": {"train": {"warmup_steps": 10.5}},
    "warmup-longer-than-training": {"train": {"warmup_steps": 100.0, "max_steps": 50}},
    "evaluation-without-data": {
        "train": {"eval_strategy": "epoch"},
        "data": {"split": {"train": 0.9, "validation": 0.0, "test": 0.1}},
    },
    "shm-larger-than-memory": {"launch": {"container": {"shm_size": "4g", "memory": "2g"}}},
    "mps-without-a-gpu": {"launch": {"container": {"mps": 50, "gpus": "none"}}},
    "nodes-out-of-reach": {
        "launch": {"on": "docker", "nodes": 2, "rendezvous": "a:1", "container": {"network": "bridge"}}
    },
    "engine-without-an-address": engine({"base_url": "localhost:8000"}),
    "engine-password-in-the-recipe": engine({"base_url": "http://me:secret@host/v1"}),
    "engine-path-without-a-folder": engine({"adapter_dir_on_server": "/adapters"}),
    "engine-runs-no-dora": engine({}, use_dora=True),
    "engine-runs-no-whole-modules": engine({}, modules_to_save=["lm_head"]),
    "engine-knows-one-rank": engine({}, rank_pattern={"q_proj": 4}),
    "engine-knows-one-alpha": engine({}, alpha_pattern={"q_proj": 4.0}),
    "engine-has-the-whole-base": engine({}, init_lora_weights="pissa"),
    "eval-steps-unused": {"train": {"eval_steps": 10}},
    "best-without-evaluation": {"train": {"load_best_model_at_end": True, "eval_strategy": "no"}},
    "best-without-data": {
        "train": {"load_best_model_at_end": True},
        "data": {"split": {"train": 1.0, "validation": 0.0, "test": 0.0}},
    },
    "best-without-checkpoints": {"train": {"load_best_model_at_end": True, "save_strategy": "no"}},
    "patience-without-evaluation": {"train": {"early_stopping_patience": 2, "eval_strategy": "no"}},
    "patience-without-data": {
        "train": {"early_stopping_patience": 2},
        "data": {"split": {"train": 1.0, "validation": 0.0, "test": 0.0}},
    },
    "schedule-free-with-a-schedule": {"train": {"optim": "schedule_free_adamw", "lr_scheduler_type": "linear"}},
    "warmup-of-its-own": {
        "train": {"optim": "schedule_free_radam", "lr_scheduler_type": "constant", "warmup_steps": 0.1}
    },
    "low-rank-under-lora": {"train": {"optim": "galore_adamw"}},
    "nothing-to-roll-back-to": {"train": {"on_divergence": "roll_back", "save_strategy": "no"}},
    "target-modules-unused": {"train": {"optim_target_modules": ["mlp"]}},
    "adam-keys-unused": {"train": {"optim": "sgd", "adam_beta1": 0.8}},
    "scaled-gradients-in-shares": {"parallel": "fsdp", "train": {"fp16": True}},
    "answers-to-no-questions": {"objective": "pretrain", "train": {"predict_with_generate": True}},
    "answers-made-anyway": {"objective": GRPO, "train": {"predict_with_generate": True}},
    "answers-of-a-stream": {"data": {"streaming": True}, "train": {"max_steps": 10, "predict_with_generate": True}},
    "answers-without-evaluation": {"train": {"predict_with_generate": True, "eval_strategy": "no"}},
    "metric-of-no-answers": {"train": {"load_best_model_at_end": True, "metric_for_best_model": "eval_rougeL"}},
    "quantized-weights-in-shares": {"parallel": "fsdp", "quantize": "nf4"},
    "optimizer-in-flat-shares": {"parallel": "zero2", "train": {"optim": "muon"}},
    "optimizer-in-shares": {"parallel": "fsdp", "train": {"optim": "adamw_8bit"}},
    "offload-without-shares": {"parallel": "fsdp", "offload": "optimizer"},
    "nodes-without-a-meeting": {"launch": {"nodes": 2}},
    "compose-numbers-its-nodes": {"launch": {"on": "compose", "nodes": 2, "rendezvous": "10.0.0.1:29500"}},
    "rendezvous-is-no-address": {"launch": {"nodes": 2, "rendezvous": "10.0.0.1"}},
    "node-beyond-the-nodes": {"launch": {"node_rank": 1}},
    "engine-of-many-processes": {**engine({}), "launch": {"processes": 2}},
    "unknown-hub": {"hub": "huggingface"},
    "offline-with-a-mirror": {"hub": "https://mirror.example", "offline": True},
    "offline-with-a-url": {"offline": True, "data": {"validation": "s3://bucket/v.jsonl"}},
    "revision-of-a-data-image": {"data": {"test": {"path": "image://data:3", "revision": "main"}}},
}

KEPT: list[dict[str, Any]] = [
    {},
    {"adapter": {"kind": "freeze", "trainable_modules": ["norm"]}},
    {"adapter": {"kind": "freeze", "first_n_layers": 1, "layer_modules": ["mlp"]}},
    {"quantize": "fp8", "model": {"path": "a/b", "adapters": ["saves/x"]}, "adapter": {"continue_from": "saves/y"}},
    {"quantize": "nf4", "adapter": {"use_dora": True, "use_rslora": True}},
    {"adapter": {"target_modules": ["q_proj"], "layers_to_transform": 3, "init_lora_weights": "pissa_niter_16"}},
    {"model": {"path": "a/b", "add_tokens": ["<a>"], "add_special_tokens": ["<b>"]}},
    {"model": RANDOM, "adapter": "full", "objective": "pretrain"},
    {"model": {**RANDOM, "config_overrides": {"hidden_size": 8}}, "adapter": "full"},
    {"objective": {"kind": "dpo", "beta": 0.3, "precompute_ref_log_probs": True}, "data": {"system": "You are kind."}},
    {"objective": "dpo", "data": {"streaming": True}, "train": {"max_steps": 10}},
    {"data": {"split": {"train": 0.7, "validation": 0.2, "test": 0.1}}},
    {"data": {"validation": "v.jsonl"}, "train": {"load_best_model_at_end": True, "early_stopping_patience": 3}},
    {"objective": "kto", "train": {"predict_with_generate": True, "metric_for_best_model": "eval_bleu"}},
    {"data": {"streaming": True, "split": {"group_by": "user"}}, "train": {"max_steps": 10}},
    {"train": {"batch_size": 16, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}},
    {"train": {"per_device_train_batch_size": 4, "warmup_steps": 0.5, "bf16": False, "fp16": True}},
    {"train": {"eval_strategy": "steps", "eval_steps": 5, "warmup_steps": 100.0}},
    {"hub": "https://mirror.example"},
    {"parallel": "ddp", "quantize": "nf4", "train": {"optim": "adamw_8bit"}},
    {"parallel": "fsdp", "offload": "all", "train": {"optim": "muon"}, "adapter": "full"},
    {
        "parallel": "zero1",
        "offload": "optimizer",
        "launch": {"nodes": 2, "node_rank": 1, "rendezvous": "[fd00::1]:29500"},
    },
    {"parallel": "zero3", "offload": "all", "launch": {"processes": 8, "nccl": {"infiniband": False}}},
    {
        "train": {"batch_size": 64, "per_device_train_batch_size": 4},
        "launch": {"processes": 8, "nodes": 2, "rendezvous": "node-0:29500"},
    },
    {"launch": {"on": "compose", "nodes": 2, "compose": {"profiles": ["monitoring"]}}},
    {"hub": "modelscope", "offline": True},
    {"offline": True, "data": {"train": {"path": "image://data:3", "revision": f"sha256:{'0' * 64}"}}},
]


def recipe(changes: dict[str, Any]) -> Recipe:
    data = {"train": "t.jsonl", **changes.get("data", {})}
    return Recipe.model_validate({"model": "a/b", **changes, "data": data})


def test_every_rule_has_a_recipe_that_breaks_it() -> None:
    assert sorted(rule.name for rule in RULES) == sorted(BROKEN)


@pytest.mark.parametrize("name", BROKEN)
def test_rule(name: str) -> None:
    broken = recipe(BROKEN[name])
    assert [rule.name for rule in RULES if rule.broken(broken)] == [name]
    rule = next(rule for rule in RULES if rule.name == name)
    with pytest.raises(RecipeError) as caught:
        check(broken, lambda key: "recipe.yaml:7" if ".".join(key) == rule.keys[0] else None)
    assert caught.value.where == "recipe.yaml:7"
    assert rule.message in caught.value.message
    assert caught.value.hint == rule.hint
    assert rule.hint
    for key in rule.keys:
        assert f"`{key}: " in caught.value.message, "the error shows the values it is about"


@pytest.mark.parametrize("changes", KEPT)
def test_sound_recipes_pass(changes: dict[str, Any]) -> None:
    check(recipe(changes))


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"parallel": "auto", "offload": "all"}, "offload-without-shares"),
        ({"parallel": "ddp", "offload": "optimizer"}, "offload-without-shares"),
        ({"parallel": "zero2", "offload": "all"}, "offload-without-shares"),
        ({"parallel": "zero3", "quantize": "fp8"}, "quantized-weights-in-shares"),
        ({"parallel": "fsdp", "adapter": "full", "train": {"optim": "galore_adamw"}}, "optimizer-in-shares"),
        ({"parallel": "zero1", "train": {"optim": "paged_adamw_8bit"}}, "optimizer-in-flat-shares"),
        ({"launch": {"rendezvous": "10.0.0.1:99999"}}, "rendezvous-is-no-address"),
        ({"launch": {"rendezvous": "fd00::1:29500"}}, "rendezvous-is-no-address"),
        ({**engine({}), "parallel": "fsdp"}, "engine-of-many-processes"),
    ],
)
def test_what_does_not_go_with_many_processes(changes: dict[str, Any], wrong: str) -> None:
    assert [rule.name for rule in RULES if rule.broken(recipe(changes))] == [wrong]


def test_what_auto_may_become_keeps_to_the_rules() -> None:
    quantised = recipe({"quantize": "nf4"})
    assert "not divided" in str(why_not_by(quantised, "fsdp")) and why_not_by(quantised, "ddp") is None
    assert why_not_by(recipe({}), "fsdp") is None


@pytest.mark.parametrize(
    ("optim", "said", "hint"),
    [
        ("adamw_troch", "there is no optimizer `adamw_troch`", "did you mean `adamw_torch`?"),
        ("adamw_8bt", "there is no optimizer `adamw_8bt`", "did you mean `adamw_8bit`?"),
        ("adamm", "there is no optimizer `adamm`", "did you mean `adamw_torch`?"),
        ("lomo", "`lomo` is not taken: it updates weights inside the backward pass", "use `adafactor`"),
    ],
)
def test_optimizers_are_known_before_anything_starts(optim: str, said: str, hint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check(recipe({"train": {"optim": optim}}), lambda key: "recipe.yaml:7")
    assert said in caught.value.message and caught.value.hint == hint and caught.value.where == "recipe.yaml:7"


def test_all_broken_rules_are_told_at_once() -> None:
    with pytest.raises(RecipeError, match="2 problems") as caught:
        check(recipe({"hub": "x", "train": {"max_steps": 0}}))
    assert "hub" in caught.value.message and "max_steps" in caught.value.message


def test_a_range_of_rewards_is_a_list_of_two() -> None:
    section = {**GRPO, "kind": "rloo", "reward_clip_range": [-1.0, 1.0]}
    assert recipe({"objective": section}).objective.reward_clip_range == [-1.0, 1.0]  # type: ignore[union-attr]


@pytest.mark.parametrize("objective", ["pretrain", "dpo", "kto", "reward", GRPO])
def test_only_sft_trains_turns(objective: Any) -> None:
    with pytest.raises(RecipeError, match="only `objective: sft` trains turns"):
        check(recipe({"objective": objective, "data": {"train_on": "last"}}))
