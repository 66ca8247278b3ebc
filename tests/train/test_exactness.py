"""The engine's contract: laid out in rows, however split, a sample gives the loss and gradients it has alone in plain transformers.

The reference is written here from the definition: one path at a time through the untouched model, float32, mean over trained
tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from families import tiny_model
from tunedock.data.layout import padded
from tunedock.data.sample import Sample, Segment, single
from tunedock.model.adapter import attach, checkpoint_activations
from tunedock.model.policy import Policy, Precision
from tunedock.objective.evaluate import mean_loss, step_terms
from tunedock.objective.likelihood import Sft
from tunedock.recipe.schema import Freeze, Full, Lora

FLOAT32 = Precision(torch.float32, torch.float32)
MODELS = ("qwen3", "llama3", "gemma", "mistral", "phi3")
CPU = torch.device("cpu")


def samples(vocabulary: int, seed: int = 0) -> list[Sample]:
    """Paths of several lengths, weights of several sizes, and one sample with two leaves."""
    draw = np.random.default_rng(seed)

    def tokens(length: int) -> np.ndarray:
        return draw.integers(1, vocabulary, length).astype(np.int32)

    def weights(length: int) -> np.ndarray:
        return draw.choice([0.0, 0.0, 1.0, 0.5], length).astype(np.float32)

    made = [single(f"s{n}", tokens(n), weights(n)) for n in (5, 17, 9, 31, 2)]
    tree = (Segment(tokens(6), weights(6)), Segment(tokens(4), weights(4), 0), Segment(tokens(7), weights(7), 0))
    return [*made, Sample("tree", tree)]


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


def without_first_token_weight(sample: Sample) -> Sample:
    """Nothing predicts the first token, so a sample puts no weight on it."""
    root = sample.segments[0]
    weights = root.weights_T.copy()
    weights[0] = 0.0
    return Sample(sample.row_id, (Segment(root.tokens_T, weights, -1), *sample.segments[1:]))


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("budget", [8, 64, 4096])
def test_loss_and_gradients_are_those_of_plain_transformers(family: str, budget: int) -> None:
    plain = tiny_model(family).train()
    group = [without_first_token_weight(s) for s in samples(plain.config.get_text_config().vocab_size)]
    expected = reference_loss(plain, group)
    expected.backward()
    wanted = gradients(plain)
    model = tiny_model(family).train()
    policy = Policy(model, CPU, FLOAT32)
    assert policy.probe() is None
    objective = Sft()
    count = objective.count(group)
    loss = 0.0
    for terms in step_terms(policy, objective, group, padded(group, budget_tokens=budget)):
        (terms.loss / count).backward()
        loss += float(terms.loss.detach()) / count
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    got = gradients(model)
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        scale = float(gradient.abs().max()) + 1e-8
        assert float((got[name] - gradient).abs().max()) / scale < 2e-5, name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_checkpointing_changes_nothing(checkpointing: bool) -> None:
    plain = attach(tiny_model("qwen3"), Lora(r=4, alpha=8), seed=1).train()
    model = attach(tiny_model("qwen3"), Lora(r=4, alpha=8), seed=1).train()
    for side in (plain, model):
        torch.manual_seed(2)
        for name, parameter in side.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    if checkpointing:
        checkpoint_activations(model)
    group = [without_first_token_weight(s) for s in samples(plain.config.vocab_size)]
    reference_loss(plain, group).backward()
    policy = Policy(model, CPU, FLOAT32)
    for terms in step_terms(policy, Sft(), group, padded(group, budget_tokens=48)):
        (terms.loss / Sft().count(group)).backward()
    wanted, got = gradients(plain), gradients(model)
    assert got.keys() == wanted.keys() and all("lora" in name for name in got)
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6)


def test_mean_loss_is_the_same_in_parts_and_whole() -> None:
    policy = Policy(tiny_model("qwen3").eval(), CPU, FLOAT32)
    group = [without_first_token_weight(s) for s in samples(100)]
    expected = float(reference_loss(policy.model, group).detach())
    for batch in (1, 2, 100):
        loss, count = mean_loss(policy, Sft(), group, lambda part: padded(part, budget_tokens=40), batch=batch)
        assert loss == pytest.approx(expected, rel=1e-5)
        assert count == pytest.approx(Sft().count(group))


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

    shape = {
        "vocab_size": 120, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    model: torch.nn.Module
    if soft_cap:
        model = Gemma2ForCausalLM(Gemma2Config(**shape, head_dim=8, final_logit_softcapping=soft_cap))
    else:
        model = CohereForCausalLM(CohereConfig(**shape, logit_scale=scale))
    policy = Policy(model.eval(), CPU, FLOAT32)
    assert policy.probe() is None
    assert policy.head == "chosen"
