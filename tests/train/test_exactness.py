"""The engine's contract: laid out in rows, however split, a sample gives the loss and gradients it has alone in plain transformers.

The reference is written here from the definition: one path at a time through the untouched model, float32, mean over trained
tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen3NextConfig,
)

from families import tiny_model
from tunedock.data.layout import Kind
from tunedock.data.sample import Sample, Segment, single
from tunedock.model.adapter import attach, checkpoint_activations, checkpointable
from tunedock.model.policy import Policy, Precision
from tunedock.objective.evaluate import measure, step_terms
from tunedock.objective.likelihood import Sft
from tunedock.recipe.adapters import Freeze, Full, Lora

FLOAT32 = Precision(torch.float32, torch.float32)
CPU = torch.device("cpu")
LAYOUTS: tuple[Kind, ...] = ("tree", "packed", "padded")
SHAPE = {
    "vocab_size": 120, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CONFIGS: dict[str, PretrainedConfig] = {
    "gemma3-window": Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=16),
    "mistral-window": MistralConfig(**SHAPE, sliding_window=9),
    "gpt-oss-sinks": GptOssConfig(**SHAPE, head_dim=8, sliding_window=16, num_local_experts=2, num_experts_per_tok=1),
    "hybrid": Qwen3NextConfig(
        **(SHAPE | {"num_hidden_layers": 4}), head_dim=8, linear_num_value_heads=4, linear_num_key_heads=2,
        linear_key_head_dim=8, linear_value_head_dim=8, num_experts=0,
    ),
}  # fmt: skip


def make(name: str) -> torch.nn.Module:
    if name not in CONFIGS:
        return tiny_model(name).train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(deepcopy(CONFIGS[name])).train()


def samples(vocabulary: int, seed: int = 0) -> list[Sample]:
    """Paths of several lengths, weights of several sizes, a long beginning that three share, and trees."""
    draw = np.random.default_rng(seed)

    def tokens(length: int) -> np.ndarray:
        return draw.integers(1, vocabulary, length).astype(np.int32)

    def weights(length: int) -> np.ndarray:
        return draw.choice([0.0, 0.0, 1.0, 0.5], length).astype(np.float32)

    made = [single(f"s{n}", tokens(n), weights(n)) for n in (5, 17, 9, 31, 2)]
    shared = tokens(35)
    made += [single(f"t{n}", np.concatenate([shared, tokens(n)]), weights(35 + n)) for n in (0, 6, 11)]
    tree = (Segment(tokens(6), weights(6)), Segment(tokens(4), weights(4), 0), Segment(tokens(7), weights(7), 0))
    deep = (*tree, Segment(tokens(3), weights(3), 1), Segment(tokens(5), weights(5), 1))
    return [without_first_token_weight(s) for s in (*made, Sample("tree", tree), Sample("deep", deep))]


def without_first_token_weight(sample: Sample) -> Sample:
    """Nothing predicts the first token, so a sample puts no weight on it."""
    root = sample.segments[0]
    weights = root.weights_T.copy()
    weights[0] = 0.0
    return Sample(sample.row_id, (Segment(root.tokens_T, weights, -1), *sample.segments[1:]))


def reference_loss(model: torch.nn.Module, group: Sequence[Sample]) -> torch.Tensor:
    """- sum w log p / sum w, path by path; a token that leaves share counts once."""
    total, count = torch.zeros(()), 0.0
    for sample in group:
        counted: set[int] = set()
        for leaf in sample.leaves():
            tokens, _ = sample.path(leaf)
            chain = sample.ancestry(leaf)
            weights = np.concatenate([sample.segments[i].weights_T * (0.0 if i in counted else 1.0) for i in chain])
            counted.update(chain)
            ids = torch.as_tensor(tokens, dtype=torch.int64)[None]
            logits = model(input_ids=ids).logits[0].double()
            logprobs = torch.log_softmax(logits[:-1], -1).gather(-1, ids[0, 1:, None])[:, 0]
            total = total - (torch.as_tensor(weights[1:]) * logprobs).sum()
        count += sample.weight
    return total / count


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def backward(policy: Policy, group: Sequence[Sample], budget: int) -> float:
    """The step's loss; its gradients are left in the model."""
    objective, loss = Sft(), 0.0
    count = objective.count(group)
    for terms in step_terms(policy, objective, group, policy.rows(group, budget)):
        (terms.loss / count).backward()
        loss += float(terms.loss.detach()) / count
    return loss


def assert_same(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """To 2e-5 of a tensor's largest gradient. Where that is below a thousandth of the model's, to 2e-8 of the model's: a sixth of
    float32's last digit there, which processors round their own ways."""
    assert got.keys() == wanted.keys()
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    for name, gradient in wanted.items():
        scale = max(float(gradient.abs().max()), 1e-3 * largest)
        assert float((got[name] - gradient).abs().max()) / scale < 2e-5, name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["qwen3", "llama3", "gemma", "mistral", "phi3", *CONFIGS])
def test_loss_and_gradients_are_those_of_plain_transformers(name: str, layout: Kind) -> None:
    plain = make(name)
    group = samples(plain.config.get_text_config().vocab_size)
    expected = reference_loss(plain, group)
    expected.backward()
    wanted = gradients(plain)
    for budget in (8, 64, 4096):
        policy = Policy(make(name), CPU, FLOAT32)
        given_up = policy.probe(layouts=[layout, "padded"])
        assert policy.layout == ("padded" if name == "hybrid" else layout), given_up
        assert policy.head == "chosen"
        policy.weighted_sum = (
            budget != 64
        )  # the trained output layer's gradients from the forward chunk, and computed again
        assert backward(policy, group, budget) == pytest.approx(float(expected.detach()), rel=1e-5)
        assert_same(gradients(policy.model), wanted)


@pytest.mark.parametrize("layers", [0, 1, None])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_adapter_gets_the_same_gradients_with_and_without_checkpointing(layout: Kind, layers: int | None) -> None:
    """In none of two layers, in one, in all."""

    def adapted() -> torch.nn.Module:
        model = attach(tiny_model("qwen3"), Lora(r=4, alpha=8), seed=1).train()
        torch.manual_seed(2)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        return model

    plain, model = adapted(), adapted()
    group = samples(plain.config.vocab_size)
    reference_loss(plain, group).backward()
    if layers != 0:
        checkpoint_activations(model, layers)
        again = [layer.gradient_checkpointing for layer in checkpointable(model)]
        assert again == ([True, True] if layers is None else [True, False])
    policy = Policy(model, CPU, FLOAT32)
    assert policy.probe(layouts=[layout]) == []
    policy.model.train()
    backward(policy, group, 48)
    got = gradients(model)
    assert all("lora" in name for name in got)
    assert_same(got, gradients(plain))


@st.composite
def forests(draw: st.DrawFn) -> list[Sample]:
    """Samples of random trees whose tokens come from a small alphabet, so that beginnings are shared by chance too."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    prefix = rng.integers(1, 4, draw(st.integers(0, 50))).astype(np.int32)
    made: list[Sample] = []
    for number in range(draw(st.integers(1, 5))):
        segments: list[Segment] = []
        for index in range(draw(st.integers(1, 4))):
            tokens = rng.integers(1, 4, draw(st.integers(1, 12))).astype(np.int32)
            if index == 0 and draw(st.booleans()):
                tokens = np.concatenate([prefix, tokens])
            weights = rng.choice([0.0, 1.0, 0.5], len(tokens)).astype(np.float32)
            parent = -1 if index == 0 else draw(st.integers(0, index - 1))
            segments.append(Segment(tokens, weights, parent))
        made.append(without_first_token_weight(Sample(f"r{number}", tuple(segments))))
    return made


@settings(max_examples=25, deadline=None)
@given(forests(), st.integers(1, 120), st.sampled_from(LAYOUTS))
def test_any_forest_in_any_rows_has_the_log_probabilities_of_its_paths(
    group: list[Sample], budget: int, layout: Kind
) -> None:
    policy = Policy(tiny_model("mistral", sliding_window=7), CPU, FLOAT32)
    policy.probe(layouts=[layout])
    with policy.plain(), torch.no_grad():
        expected = float(reference_loss(policy.model, group)) if any(s.weight for s in group) else 0.0
    measured = measure(policy, Sft(), group, lambda part: policy.rows(part, budget))
    assert measured.loss == pytest.approx(expected, rel=2e-5, abs=1e-6)


def test_the_mean_loss_is_the_same_in_parts_and_whole() -> None:
    policy = Policy(tiny_model("qwen3").eval(), CPU, FLOAT32)
    group = samples(100)
    expected = float(reference_loss(policy.model, group).detach())
    policy.probe()
    for batch in (1, 2, 100):
        measured = measure(policy, Sft(), group, lambda part: policy.rows(part, 40), batch=batch)
        assert measured.loss == pytest.approx(expected, rel=1e-5)
        assert measured.count == pytest.approx(Sft().count(group))


def test_a_shared_beginning_is_computed_once() -> None:
    policy = Policy(tiny_model("qwen3"), CPU, FLOAT32)
    policy.probe()
    group = samples(100)
    alone = sum(len(sample.path(leaf)[0]) for sample in group for leaf in sample.leaves())
    (row,) = policy.rows(group, 4096)
    assert row.tokens == sum(sample.tokens for sample in group) - 2 * 35
    assert row.tokens < alone - 2 * 35


def test_what_each_adapter_trains() -> None:
    def trained(model: torch.nn.Module) -> set[str]:
        return {name for name, p in model.named_parameters() if p.requires_grad}

    full = trained(attach(tiny_model("qwen3"), Full(), seed=0))
    last = trained(attach(tiny_model("qwen3"), Freeze(last_n_layers=1), seed=0))
    norms = trained(attach(tiny_model("qwen3"), Freeze(trainable_modules=["norm"]), seed=0))
    lora = trained(attach(tiny_model("qwen3"), Lora(r=2, alpha=4), seed=0))
    assert last and all(".layers.1." in name for name in last) and last < full
    assert norms and all("norm" in name for name in norms) and norms < full
    assert lora and all("lora_" in name for name in lora)
    assert not any("lm_head" in name for name in lora)


@pytest.mark.parametrize(("soft_cap", "scale"), [(30.0, None), (None, 0.0625)])
def test_what_a_model_does_to_its_logits_is_done_in_the_head(soft_cap: float | None, scale: float | None) -> None:
    """Gemma 2 caps its logits, Cohere scales them."""
    from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    model: torch.nn.Module
    if soft_cap:
        model = Gemma2ForCausalLM(Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=soft_cap))
    else:
        model = CohereForCausalLM(CohereConfig(**SHAPE, logit_scale=scale))
    policy = Policy(model.eval(), CPU, FLOAT32)
    assert policy.probe() == []
    assert policy.head == "chosen"


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(name, layout, marks=() if name == "qwen3" or layout == "tree" else pytest.mark.long)
        for name in ("qwen3", "gemma", "mistral-window")
        for layout in LAYOUTS
    ],
)
def test_a_step_in_bfloat16_is_as_near_to_the_truth_as_plain_transformers(name: str, layout: Kind, kind: str) -> None:
    """The truth is float32, from the same rounded weights."""

    def made(dtype: torch.dtype) -> torch.nn.Module:
        model = make(name).to(torch.bfloat16).to(dtype)
        model = attach(model, Lora(r=4, alpha=8) if kind == "lora" else Full(), seed=1).train()
        torch.manual_seed(2)
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.1)
        return model

    truth, plain, model = made(torch.float32), made(torch.bfloat16), made(torch.bfloat16)
    group = samples(truth.config.get_text_config().vocab_size)
    wanted = reference_loss(truth, group)
    wanted.backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = reference_loss(plain, group)
    rounded.backward()
    policy = Policy(model, CPU, Precision(torch.bfloat16, torch.bfloat16))
    policy.probe(layouts=[layout])
    policy.weighted_sum = True
    loss = backward(policy, group, 64)
    allowed = 1.2 * distance(gradients(plain), gradients(truth))
    assert distance(gradients(model), gradients(truth)) <= allowed <= 0.1
    assert abs(loss - float(wanted.detach())) <= 2e-3 * float(wanted.detach())
    assert abs(float((rounded - wanted).detach())) <= 2e-3 * float(wanted.detach())


def distance(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Of all gradients as one vector, relative to its length."""
    assert got.keys() == wanted.keys()
    away = sum(float(((got[name] - value) ** 2).sum()) for name, value in wanted.items())
    return (away / sum(float((value**2).sum()) for value in wanted.values())) ** 0.5
