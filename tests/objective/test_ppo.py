"""PPO's loss and gradients are those of the paper, written out in float64, however a step is split into rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from experiences import experiences, token_logprobs, with_old
from families import tiny_model
from steps import FLOAT32, Bigrams, assert_same_gradients, gradients, run_step
from tunedock.data.layout import Kind, lay_out
from tunedock.errors import ModelError
from tunedock.model.policy import Policy
from tunedock.objective.base import StepLogprobs
from tunedock.objective.experience import Answer, Experience
from tunedock.objective.ppo import Ppo

CPU = torch.device("cpu")


def of_the_paper(
    logprob_T: Tensor, value_T: Tensor, answer: Answer, clip: float, clip_value: float, vf: float
) -> Tensor:
    """The loss of each token: minus the clipped surrogate (Schulman et al. 2017, eq. 7), plus the clipped squared error."""
    told = {
        name: torch.as_tensor(getattr(answer, name)).double()
        for name in ("old_T", "value_T", "return_T", "advantage_T")
    }
    ratio_T = (logprob_T - told["old_T"]).exp()
    surrogate_T = torch.min(ratio_T * told["advantage_T"], ratio_T.clamp(1 - clip, 1 + clip) * told["advantage_T"])
    near_T = torch.max(torch.min(value_T, told["value_T"] + clip_value), told["value_T"] - clip_value)
    worth_T = torch.max((value_T - told["return_T"]) ** 2, (near_T - told["return_T"]) ** 2)
    return -surrogate_T + vf * worth_T / 2


@pytest.mark.parametrize("kind", ["tree", "packed", "padded"])
@pytest.mark.parametrize(("clip", "clip_value", "vf"), [(0.2, 0.2, 0.1), (0.05, 0.5, 1.0)])
def test_loss_and_gradients_are_those_of_the_paper(kind: Kind, clip: float, clip_value: float, vf: float) -> None:
    plain = tiny_model("qwen3").train()
    group = with_old(plain, experiences(3, 2, plain.config.vocab_size, by_token=True))
    width = plain.config.hidden_size
    weight_D = torch.randn(width, generator=torch.Generator().manual_seed(0)).double().div(4).requires_grad_()
    losses = []
    for experience in group:
        for number, answer in enumerate(experience.answers):
            tokens, _ = experience.path(number + 1)
            ids = torch.as_tensor(tokens, dtype=torch.int64)[None]
            hidden_TD = plain.model(input_ids=ids).last_hidden_state[0].double()
            length = len(answer.advantage_T)
            value_T = (hidden_TD @ weight_D)[-length - 1 : -1]
            losses.append(
                of_the_paper(token_logprobs(plain, experience, number), value_T, answer, clip, clip_value, vf)
            )
    expected = torch.cat(losses).mean()
    expected.backward()
    wanted = gradients(plain)
    model = tiny_model("qwen3").train()
    policy = Policy(model, CPU, FLOAT32)
    assert policy.probe(layouts=(kind,)) == []
    policy.add_value_head()
    with torch.no_grad():
        model.value_head.weight.copy_(weight_D[None].float())
    assert "value_head.weight" in dict(policy.trainable)
    for budget in (8, 64, 4096):
        model.zero_grad()
        objective = Ppo(cliprange=clip, cliprange_value=clip_value, vf_coef=vf)
        loss, metrics = run_step(policy, objective, group, policy.rows(group, budget))
        assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
        found = gradients(model)
        head, bias = found.pop("value_head.weight"), found.pop("value_head.bias")
        torch.testing.assert_close(
            head[0].double(), weight_D.grad, rtol=1e-4, atol=1e-5 * float(weight_D.grad.abs().max())
        )
        assert bias.abs() > 0
        assert_same_gradients(found, wanted)
        assert metrics["loss/policy"] + vf * metrics["loss/value"] == pytest.approx(loss, rel=1e-5)
    policy.drop_value_head()
    assert not any("value_head" in name for name in model.state_dict())
    assert policy.values_N is None


def test_a_value_head_begins_by_expecting_nothing_and_needs_the_replaced_output_layer() -> None:
    policy = Policy(tiny_model("qwen3"), CPU, FLOAT32)
    policy.add_value_head()
    group = experiences(1, 2, policy.config.vocab_size)
    (row,) = policy.rows(group, 4096)
    policy.logprobs(row)
    assert policy.values_N is not None
    assert policy.values_N.shape == (len(row.chosen),)
    assert not policy.values_N.any()
    bare = Policy(tiny_model("qwen3"), CPU, FLOAT32)
    bare._head = None
    with pytest.raises(ModelError, match="value head"):
        bare.add_value_head()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 200), st.sampled_from(["tree", "packed", "padded"]))
def test_however_rows_are_split(prompts: int, answers: int, budget: int, kind: Kind) -> None:
    group = experiences(prompts, answers, 20, seed=prompts * 7 + answers, by_token=True, all_count=False)
    found = []
    for rows in (lay_out(group, "padded", budget_tokens=100_000), lay_out(group, kind, budget_tokens=budget)):
        model = Bigrams(20, 1, values=True)
        loss, _ = run_step(model, Ppo(), group, rows)
        found.append((loss, *gradients(model).values()))
    for once, again in zip(*found, strict=True):
        torch.testing.assert_close(torch.as_tensor(once), torch.as_tensor(again), rtol=1e-4, atol=1e-6)


def test_what_it_cannot_do_without() -> None:
    group = experiences(1, 2, 20)
    unread = [
        Experience(e.row_id, e.segments, answers=tuple(Answer(a.reward, a.advantage_T) for a in e.answers))
        for e in group
    ]
    with pytest.raises(ValueError, match="old log-probabilities"):
        Ppo().prepare(StepLogprobs(unread))
    with pytest.raises(ValueError, match="value head"):
        run_step(Bigrams(20, 0), Ppo(), group, lay_out(group, "tree", budget_tokens=100))
