"""DPO's loss and gradients are those of its definition and of TRL, however a step is split into rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from families import tiny_model
from pair_steps import LENGTHS, Fixed, moved, run_step
from pairs import pair, pairs, rewards
from steps import CPU, FLOAT32, Bigrams, assert_same_gradients, gradients
from tunedock.data.layout import Kind, lay_out
from tunedock.model.policy import Policy
from tunedock.model.reference import Reference
from tunedock.objective.base import StepLogprobs
from tunedock.objective.dpo import Dpo
from tunedock.objective.evaluate import measure, rows_of_split_samples, step_terms
from tunedock.objective.likelihood import Sft
from tunedock.objective.orpo import Orpo
from tunedock.objective.simpo import Simpo
from tunedock.recipe.objectives import likelihood, preference


@pytest.mark.parametrize("kind", ["tree", "packed", "padded"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_and_gradients_are_those_of_plain_transformers(kind: Kind, smoothing: float) -> None:
    """Path by path through the untouched model, float64 sums, for budgets that part pairs, share rows and hold all."""
    began = tiny_model("qwen3").eval()
    plain = moved(tiny_model("qwen3")).train()
    group = pairs(5, plain.config.vocab_size)
    reward_S2 = rewards(plain, began, group, beta=0.3)
    margin_S = reward_S2[:, 0] - reward_S2[:, 1]
    sigmoid = torch.nn.functional.logsigmoid
    expected = -((1 - smoothing) * sigmoid(margin_S) + smoothing * sigmoid(-margin_S)).mean()
    expected.backward()
    wanted, reward_S2, margin_S = gradients(plain), reward_S2.detach(), margin_S.detach()
    model = tiny_model("qwen3").train()
    policy = Policy(model, CPU, FLOAT32)
    assert policy.probe(layouts=(kind,)) == []
    reference = Reference.of(policy)
    moved(model)
    for budget in (8, 48, 96, 4096):
        model.zero_grad()
        objective = Dpo(beta=0.3, label_smoothing=smoothing)
        loss, metrics = run_step(policy, reference, objective, group, policy.rows(group, budget))
        assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
        assert_same_gradients(gradients(model), wanted)
        assert metrics["rewards/chosen"] == pytest.approx(float(reward_S2[:, 0].mean()), rel=1e-4, abs=1e-5)
        assert metrics["rewards/margins"] == pytest.approx(float(margin_S.mean()), rel=1e-4, abs=1e-5)
        assert metrics["rewards/accuracies"] == pytest.approx(float((margin_S > 0).double().mean()))


def test_a_policy_that_has_not_moved_loses_log_two() -> None:
    model = tiny_model("qwen3").train()
    policy = Policy(model, CPU, FLOAT32)
    group = pairs(3, model.config.vocab_size)
    loss, metrics = run_step(policy, Reference.of(policy), Dpo(), group, policy.rows(group, 4096))
    assert loss == pytest.approx(math.log(2), rel=1e-7)
    assert metrics["rewards/margins"] == metrics["rewards/accuracies"] == 0.0
    assert metrics["logps/chosen"] < 0


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(LENGTHS, min_size=1, max_size=7),
    budget=st.integers(1, 80),
    kind=st.sampled_from(["tree", "packed", "padded"]),
    seed=st.integers(0, 99),
)
def test_however_rows_are_split(sizes: list[tuple[int, int, int]], budget: int, kind: Kind, seed: int) -> None:
    """Pairs of any shape, one of them twice, over any budget: same loss, same gradient, each pair counted once."""
    draw = np.random.default_rng(seed)
    group = [pair(f"p:{n}", prompt + 1, *rest, draw, 20) for n, (prompt, *rest) in enumerate(sizes)]
    group.append(group[0])
    model = Bigrams(20, seed)
    reference_S2 = -torch.rand(len(group), 2, dtype=torch.float64) * 10
    objective = Dpo(beta=0.2)
    policy_S2 = torch.stack([torch.stack([model.of(sample, leaf) for leaf in (0, 1)]) for sample in group])
    reward_S2 = 0.2 * (policy_S2 - reference_S2)
    expected = -torch.nn.functional.logsigmoid(reward_S2[:, 0] - reward_S2[:, 1]).mean()
    (wanted,) = torch.autograd.grad(expected, [model.table_VV])
    loss = 0.0
    counted = 0.0
    for terms in step_terms(model, objective, group, lay_out(group, kind, budget_tokens=budget), Fixed(reference_S2)):
        (terms.loss / len(group)).backward()
        loss += float(terms.loss.detach()) / len(group)
        counted += float(terms.metrics["rewards/margins"][1])
    assert counted == len(group)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    torch.testing.assert_close(model.table_VV.grad, wanted, rtol=1e-4, atol=1e-6)


def test_only_rows_with_a_part_of_a_pair_are_read_first() -> None:
    group = [pair("a", 4, 20, 20, np.random.default_rng(0), 20), pair("b", 2, 3, 3, np.random.default_rng(1), 20)]
    rows = lay_out(group, "tree", budget_tokens=30)
    split = rows_of_split_samples(rows)
    assert {int(n) for i in split for n in np.unique(rows[i].chosen.sample_N)} >= {0}
    model, fixed = Bigrams(20, 0), Fixed(torch.zeros(2, 2, dtype=torch.float64))
    list(step_terms(model, Dpo(), group, rows, fixed))
    assert model.calls == len(rows) + len(split)
    model.calls = 0
    with torch.no_grad():
        list(step_terms(model, Dpo(), group, rows, fixed))
    assert model.calls == len(rows), "without gradients what was read is used"
    model.calls = 0
    list(step_terms(model, Dpo(), group, lay_out(group, "tree", budget_tokens=500), fixed))
    assert model.calls == 1


def test_a_leaf_is_never_split() -> None:
    group = [pair("a", 4, 5, 6, np.random.default_rng(0), 20)]
    (row,) = lay_out(group, "tree", budget_tokens=100)
    with pytest.raises(ValueError, match="two rows"):
        rows_of_split_samples([row, row])
    assert rows_of_split_samples([]) == []


def test_what_it_cannot_do_without() -> None:
    group = pairs(1, 20)
    rows = lay_out(group, "tree", budget_tokens=100)
    with pytest.raises(ValueError, match="needs a reference"):
        next(step_terms(Bigrams(20, 0), Dpo(), group, rows))
    with pytest.raises(ValueError, match="two leaves"):
        Dpo().prepare(StepLogprobs(group, reference_SL=torch.zeros(1, 1)))
    assert Sft().prepare(StepLogprobs(group)) is None


def test_measured_in_parts_and_whole() -> None:
    began = tiny_model("qwen3").eval()
    policy = Policy(tiny_model("qwen3").eval(), CPU, FLOAT32)
    group = pairs(7, policy.config.vocab_size)
    reference = Reference.of(policy)
    moved(policy.model)
    reward_S2 = rewards(policy.model, began, group, beta=0.1).detach()
    margin_S = reward_S2[:, 0] - reward_S2[:, 1]
    for batch in (1, 3, 100):
        got = measure(policy, Dpo(), group, lambda part: policy.rows(part, 40), reference=reference, batch=batch)
        assert got.count == 7
        assert got.loss == pytest.approx(float(-torch.nn.functional.logsigmoid(margin_S).mean()), rel=1e-5)
        assert got.metrics["rewards/accuracies"] == pytest.approx(float((margin_S > 0).double().mean()))
        assert got.metrics["rewards/rejected"] == pytest.approx(float(reward_S2[:, 1].mean()), rel=1e-4, abs=1e-5)


def test_the_recipe_makes_it() -> None:
    from tunedock.objective.registry import make

    assert make(preference.Dpo(beta=0.4, label_smoothing=0.1)) == Dpo(beta=0.4, label_smoothing=0.1)
    assert make(preference.Dpo(loss_type="ipo", sft_weight=2.0)) == Dpo(loss_type="ipo", sft_weight=2.0)
    assert make(preference.Orpo(beta=0.3)) == Orpo(beta=0.3)
    assert make(preference.Simpo(beta=3.0, simpo_gamma=0.2, sft_weight=1.0)) == Simpo(3.0, 0.2, 1.0)
    assert (make(likelihood.Sft()).name, make(likelihood.Pretrain()).name) == ("sft", "pretrain")
