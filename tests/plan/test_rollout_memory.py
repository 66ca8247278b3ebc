"""What answers and references hold, by arithmetic, against the tensors of real generations and real policies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from families import tiny_model
from live_memory import LiveBytes
from tunedock.model.adapter import attach
from tunedock.model.answers import Sampler, Sampling
from tunedock.model.policy import Policy, Precision
from tunedock.model.reference import Reference
from tunedock.plan.cards import card
from tunedock.plan.decoder import decoder
from tunedock.plan.memory import plan_memory
from tunedock.plan.outlook import outlook
from tunedock.plan.rollout_memory import CACHE, LOGITS, Answering, answering, answering_parts, reference_bytes
from tunedock.plan.shapes import Shape, find_shape
from tunedock.recipe.adapters import Adapter, Freeze, Full, Lora
from tunedock.recipe.schema import Recipe

LORA = Lora(r=4, alpha=8)
BYTES = {"float32": 4, "bfloat16": 2}


def policy_of(model: PreTrainedModel, adapter: Adapter, weights: str = "float32", compute: str = "float32") -> Policy:
    model = attach(model.to(getattr(torch, weights)), adapter, seed=0)
    policy = Policy(model, torch.device("cpu"), Precision(getattr(torch, weights), getattr(torch, compute)))
    policy.probe()
    return policy


def sampled(policy: Policy, how: Answering, prompt: int, *, group: int) -> int:
    """Bytes alive at the peak while the answers are made."""
    vocabulary = policy.config.vocab_size
    sampler = Sampler(policy, stop_ids={vocabulary}, pad_id=0, batch_size=how.at_once)  # no answer ends early
    prompts = [[3 + n] * prompt for n in range(how.at_once // group)]
    sampling = Sampling(how.max_new_tokens, how.temperature, how.top_k, how.top_p)
    live = LiveBytes([*policy.model.parameters(), *policy.model.buffers()])
    with live:
        sampler(prompts, group, sampling, seed=0)
    return live.peak


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen3", {}),
        ("gemma", {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}),
        ("phi3", {}),
    ],
)
@pytest.mark.parametrize(
    ("weights", "compute", "adapter"),
    [("bfloat16", "bfloat16", LORA), ("float32", "bfloat16", Full())],
)
def test_the_cache_is_as_large_as_planned(
    monkeypatch: pytest.MonkeyPatch, family: str, changes: dict[str, Any], weights: str, compute: str, adapter: Adapter
) -> None:
    model = tiny_model(family, **changes)
    policy = policy_of(model, adapter, weights, compute)
    caches: list[DynamicCache] = []
    own = DynamicCache.batch_repeat_interleave
    monkeypatch.setattr(
        DynamicCache, "batch_repeat_interleave", lambda cache, n: (caches.append(cache), own(cache, n))[1]
    )
    how, prompt = Answering(6, 3, max_new_tokens=5), 11
    sampled(policy, how, prompt, group=2)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in caches[-1].layers)
    config = model.config.to_dict()
    planned = answering_parts(
        decoder(config), config, how, w=BYTES[weights], c=BYTES[compute], longest_path=prompt + how.max_new_tokens
    )
    assert planned[CACHE] == held


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 50, 1.0), (1.0, 0, 0.9), (0.7, 50, 0.9)],
)
def test_logits_are_as_large_as_planned(temperature: float, top_k: int, top_p: float) -> None:
    model = tiny_model("qwen3", vocab_size=40_000)
    how = Answering(16, 4, 3, temperature, top_k, top_p)
    peak = sampled(policy_of(model, LORA, "bfloat16", "bfloat16"), how, 4, group=4)
    config = model.config.to_dict()
    planned = answering_parts(decoder(config), config, how, w=2, c=2, longest_path=7)
    assert planned[LOGITS] > 0.95 * sum(planned.values())
    assert sum(planned.values()) == pytest.approx(peak, rel=0.05)


@pytest.mark.parametrize(
    ("prompt", "new", "group", "weights", "adapter"),
    [
        (100, 50, 8, "float32", Full()),
        (50, 60, 8, "bfloat16", LORA),
        (400, 4, 1, "float32", Full()),
        (400, 4, 8, "bfloat16", LORA),
    ],
)
def test_long_prompts_and_long_answers(prompt: int, new: int, group: int, weights: str, adapter: Adapter) -> None:
    model = tiny_model("qwen3", hidden_size=128, intermediate_size=512, max_position_embeddings=512)
    how = Answering(8, 8 // group, new)
    peak = sampled(policy_of(model, adapter, weights, weights), how, prompt, group=group)
    config = model.config.to_dict()
    w = BYTES[weights]
    planned = answering_parts(decoder(config), config, how, w=w, c=w, longest_path=prompt + new)
    assert 0.8 * sum(planned.values()) < peak < 1.1 * sum(planned.values()), (peak, planned)


def test_answers_at_evaluations_may_be_longer_than_any_sample() -> None:
    """As many tokens as the recipe allows, after the longest question there may be."""
    model = tiny_model("qwen3", hidden_size=128, intermediate_size=512, max_position_embeddings=512)
    config, shape = model.config.to_dict(), decoder(model.config.to_dict())
    within = answering_parts(shape, config, Answering(8, 8, 50), w=4, c=4, longest_path=250)
    beyond = answering_parts(shape, config, Answering(8, 8, 50, beyond=50), w=4, c=4, longest_path=200)
    assert within == beyond


def test_answers_take_the_place_of_gradients_and_activations() -> None:
    config = find_shape_config()
    without = plan_memory(config, adapter=Full())
    plan = plan_memory(config, adapter=Full(), answering=Answering(64, 8, 256), longest_path=2048)
    assert plan.parts == without.parts and plan.to_come_bytes == without.to_come_bytes
    stands = plan.fixed_bytes - plan.parts["gradients"] - plan.parts["head"]
    assert plan.answering_bytes == stands + sum(plan.answering.values())
    assert plan.needed(0) == plan.answering_bytes and plan.needed(1 << 30) == without.needed(1 << 30)
    assert without.answering_bytes == 0
    assert plan.answering[CACHE] == 64 * 2047 * 28 * 2 * 8 * 128 * 2


def find_shape_config() -> dict[str, Any]:
    return dict(find_shape(recipe().model).config)


def recipe(objective: Any = "sft", adapter: Any = "lora", **more: Any) -> Recipe:
    model = {"path": "Qwen/Qwen3-0.6B", **more.pop("model", {})}
    train = {"batch_size": 16, "eval_strategy": "no", **more.pop("train", {})}
    values = {"model": model, "objective": objective, "adapter": adapter, "data": {"train": "x.jsonl"}, "train": train}
    return Recipe.model_validate({**values, **more})


REWARDED = {"rewards": ["exact_match"], "max_new_tokens": 64}


@pytest.mark.parametrize(
    ("objective", "train", "wanted"),
    [
        ("sft", {}, None),
        ("dpo", {}, None),
        ("sft", {"predict_with_generate": True}, (16, 16)),  # at evaluations, as many as `eval.batch_size`
        ({"kind": "grpo", **REWARDED}, {}, (16, 2)),
        ({"kind": "grpo", **REWARDED, "steps_per_generation": 8}, {}, (64, 8)),
        ({"kind": "grpo", **REWARDED}, {"eval_strategy": "epoch"}, (64, 64)),  # a prompt each, in a validation
        ({"kind": "ppo", **REWARDED, "engine": {"kind": "local", "max_num_seqs": 4}}, {}, (4, 4)),
        ({"kind": "rloo", **REWARDED, "engine": {"kind": "openai", "base_url": "http://h/v1", "model": "m"}}, {}, None),
    ],
)
def test_how_a_recipe_makes_answers(objective: Any, train: dict[str, Any], wanted: tuple[int, int] | None) -> None:
    how = answering(recipe(objective, train=train))
    assert (None if how is None else (how.at_once, how.prompts)) == wanted


@pytest.mark.parametrize(
    ("objective", "adapter", "model", "wanted"),
    [
        ("sft", "full", {}, 0),
        ("orpo", "full", {}, 0),
        ("dpo", "lora", {}, 0),
        ("dpo", "full", {}, 2),
        ("kto", {"kind": "freeze", "last_n_layers": 2}, {}, 2),
        ("dpo", "full", {"add_tokens": ["<a>"]}, 4),
        ({"kind": "dpo", "precompute_ref_log_probs": True}, "full", {}, 0),
        ("dpo", {"use_dora": True}, {}, 4),
        ("dpo", {"init_lora_weights": "pissa"}, {}, 4),
        ("dpo", {"init_lora_weights": "gaussian"}, {}, 0),
        ("dpo", {"modules_to_save": ["norm"]}, {}, 4),
        ("dpo", {"continue_from": "somewhere"}, {}, 4),
        ("dpo", "lora", {"add_tokens": ["<a>"]}, 4),
        ({"kind": "grpo", **REWARDED}, "full", {}, 0),
        ({"kind": "grpo", **REWARDED, "beta": 0.1}, "full", {}, 2),
        ({"kind": "rloo", **REWARDED}, "full", {}, 2),
        ({"kind": "ppo", **REWARDED}, "full", {}, 2),
        ({"kind": "ppo", **REWARDED, "kl_coef": 0.0}, "full", {}, 0),
    ],
)
def test_which_recipes_keep_a_copy_for_the_reference(
    objective: Any, adapter: Any, model: dict[str, Any], wanted: int
) -> None:
    assert reference_bytes(recipe(objective, adapter, model=model), {"dtype": "bfloat16"}) == wanted
    assert (
        reference_bytes(recipe(objective, adapter, model=model), {"torch_dtype": "float32"}) == 2 * wanted
        or wanted == 4
    )


@pytest.mark.parametrize(
    ("adapter", "trained_in"),
    [(Full(), torch.float32), (Full(), torch.bfloat16), (Freeze(last_n_layers=1), torch.bfloat16), (LORA, torch.float32),
     (Lora(r=4, alpha=8, use_dora=True), torch.float32), (Lora(r=4, alpha=8, modules_to_save=["norm"]), torch.float32)],
)  # fmt: skip
def test_a_reference_is_as_large_as_planned(adapter: Adapter, trained_in: torch.dtype) -> None:
    model = tiny_model("qwen3").to(trained_in).float()  # as it is read: wide enough to train, of numbers of its file
    config = {**model.config.to_dict(), "dtype": str(trained_in).removeprefix("torch.")}
    policy = policy_of(model, adapter)
    if trained_in is torch.float32 and adapter != LORA:  # numbers of all digits: a norm's ones need none of them
        with torch.no_grad():
            for _, parameter in policy.trainable:
                parameter.copy_(torch.rand_like(parameter))
    each = reference_bytes(recipe("dpo", adapter.model_dump()), config)
    plan = plan_memory(config, adapter=adapter, weights="float32", compute="float32", reference=each)
    assert plan.parts["reference copy"] == Reference.of(policy).kept_bytes
    assert (
        plan.to_come_bytes == plan_memory(config, adapter=adapter, weights="float32", compute="float32").to_come_bytes
    )


@pytest.mark.parametrize("adapter", [Full(), LORA])
def test_a_value_head_is_counted(adapter: Adapter) -> None:
    model = tiny_model("qwen3")
    config = model.config.to_dict()
    policy = policy_of(model, adapter)
    policy.add_value_head()
    plan = plan_memory(config, adapter=adapter, weights="float32", compute="float32", valued=True)
    numbers = sum(parameter.numel() for _, parameter in policy.trainable)
    assert plan.parts["gradients"] == 4 * numbers and plan.parts["optimizer"] == 8 * numbers


def test_fewer_answers_at_once_are_a_way() -> None:
    grpo = {"kind": "grpo", "rewards": ["exact_match"], "max_new_tokens": 4096}
    data = {"train": "x.jsonl", "max_length": 8192}
    long = recipe(grpo, data=data, train={"batch_size": 64})
    shape = find_shape(long.model)
    found = outlook(long, shape, card("4090", 1))
    assert not found.fits and found.need.answering_bytes > found.need.step(found.longest)
    way = next(way for way in found.ways if "max_num_seqs" in way.change)
    assert way.fits and way.change == "objective.engine.max_num_seqs=16"
    fewer = recipe({**grpo, "engine": {"max_num_seqs": 16}}, data=data, train={"batch_size": 64})
    assert outlook(fewer, shape, card("4090", 1)).fits


def test_asking_the_reference_before_is_a_way() -> None:
    full = recipe("dpo", "full", model={"path": "Qwen/Qwen3-4B"})
    shape = find_shape(full.model)
    assert isinstance(shape, Shape)
    found = outlook(full, shape, card("a100-80g", 1))
    assert found.need.parts["reference copy"] == 2 * found.trained
    assert any(way.change == "objective.precompute_ref_log_probs=true" for way in found.ways) is not found.fits
