"""GRPO's loss and gradients are those of TRL's trainer on the same batch, however a step is split into rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from experiences import experiences, token_logprobs, with_old
from families import tiny_model, tokenizer
from steps import FLOAT32, Bigrams, assert_same_gradients, gradients, run_step
from tunedock.data.layout import Kind, lay_out
from tunedock.data.sample import single
from tunedock.model.policy import Policy
from tunedock.objective.base import StepLogprobs
from tunedock.objective.experience import Answer, Experience
from tunedock.objective.grpo import Grpo

CPU = torch.device("cpu")


def padded(group: Sequence[Experience]) -> dict[str, Any]:
    """The batch as TRL has it: prompts padded on the left, completions on the right."""
    answers = [(e, n) for e in group for n in range(len(e.answers))]
    prompts = [torch.as_tensor(e.segments[0].tokens_T, dtype=torch.int64) for e, _ in answers]
    completions = [torch.as_tensor(e.segments[n + 1].tokens_T, dtype=torch.int64) for e, n in answers]
    weights = [torch.as_tensor(e.segments[n + 1].weights_T, dtype=torch.int64) for e, n in answers]

    def right(values: Sequence[Tensor]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(values), batch_first=True)

    def left(values: Sequence[Tensor]) -> Tensor:
        return right([value.flip(0) for value in values]).flip(1)

    mask = right(weights)
    return {
        "prompt_ids": left(prompts),
        "prompt_mask": left([torch.ones_like(prompt) for prompt in prompts]),
        "completion_ids": right(completions),
        "completion_mask": mask,
        "advantages": torch.tensor([float(e.answers[n].advantage_T[0]) for e, n in answers]),
        "old_per_token_logps": right([torch.as_tensor(e.answers[n].old_T) for e, n in answers]),
        "ref_per_token_logps": right([torch.as_tensor(e.answers[n].reference_T) for e, n in answers]),
        "num_items_in_batch": mask.sum(),
    }


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> GRPOTrainer:
    return GRPOTrainer(
        model=tiny_model("qwen3"),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")),
            report_to=[],
            use_cpu=True,
            bf16=False,
            num_generations=4,
            per_device_train_batch_size=8,
            activation_checkpointing=False,
        ),
        train_dataset=Dataset.from_list([{"prompt": "a"}] * 8),
        processing_class=tokenizer("qwen3"),
    )


def trl_loss(trainer: GRPOTrainer, group: Sequence[Experience], theirs: dict[str, Any]) -> Tensor:
    """TRL's own, with gradient, under these settings."""
    settings = {"beta": 0.0, "loss_type": "dapo", "importance_sampling_level": "token", "max_completion_length": 20}
    settings |= {"epsilon_low": 0.2, "epsilon_high": 0.2, "current_gradient_accumulation_steps": 1}
    for name, value in {**settings, **theirs}.items():
        if name in ("delta", "unbiased_kl"):
            continue
        assert hasattr(trainer, name) or name == "current_gradient_accumulation_steps"
        setattr(trainer, name, value)
    trainer.args.delta = theirs.get("delta")
    trainer.args.use_bias_correction_kl = theirs.get("unbiased_kl", True)
    trainer.model.zero_grad()
    loss: Tensor = trainer._compute_loss(trainer.model.train(), padded(group))
    return loss


CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"beta": 0.1}, {"beta": 0.1}),
    ({"loss_type": "grpo", "beta": 0.04, "unbiased_kl": False}, {"loss_type": "grpo", "beta": 0.04, "unbiased_kl": False}),
    ({"loss_type": "dr_grpo", "max_new_tokens": 20}, {"loss_type": "dr_grpo"}),
    ({"loss_type": "cispo", "epsilon_high": 1.1}, {"loss_type": "cispo", "epsilon_high": 1.1}),
    ({"epsilon": 0.1, "epsilon_high": 0.3, "delta": 1.2}, {"epsilon_low": 0.1, "epsilon_high": 0.3, "delta": 1.2}),
    ({"level": "sequence", "loss_type": "grpo"}, {"importance_sampling_level": "sequence", "loss_type": "grpo"}),
    ({"level": "sequence"}, {"importance_sampling_level": "sequence"}),
]  # fmt: skip


@pytest.mark.parametrize(("ours", "theirs"), CASES, ids=[str(sorted(ours.items())) for ours, _ in CASES])
@pytest.mark.parametrize("all_count", [True, False], ids=["all", "some"])
def test_loss_and_gradients_are_those_of_trl(
    ours: dict[str, Any], theirs: dict[str, Any], all_count: bool, trainer: GRPOTrainer
) -> None:
    plain = tiny_model("qwen3")
    group = with_old(plain, experiences(3, 4, plain.config.vocab_size, all_count=all_count))
    expected = trl_loss(trainer, group, theirs)
    expected.backward()
    wanted = gradients(trainer.model)
    model = tiny_model("qwen3").train()
    policy = Policy(model, CPU, FLOAT32)
    policy.probe()
    for budget in (8, 64, 4096):
        model.zero_grad()
        loss, metrics = run_step(policy, Grpo(**ours), group, policy.rows(group, budget))
        assert loss == pytest.approx(float(expected.detach()), rel=1e-5, abs=1e-6)
        assert_same_gradients(gradients(model), wanted)
        assert ("kl" in metrics) == bool(ours.get("beta"))


@pytest.mark.parametrize("kind", ["tree", "packed", "padded"])
def test_every_layout_gives_the_definition(kind: Kind) -> None:
    """Equation 3 in float64, answer by answer through the untouched model."""
    plain = tiny_model("qwen3").train()
    group = with_old(plain, experiences(3, 3, plain.config.vocab_size, seed=5))
    answers = [(e, n, e.answers[n]) for e in group for n in range(3)]
    terms = []
    for experience, number, answer in answers:
        logprob_T = token_logprobs(plain, experience, number)
        ratio_T = (logprob_T - torch.as_tensor(answer.old_T).double()).exp()
        advantage = float(answer.advantage_T[0])
        gain_T = torch.min(ratio_T * advantage, ratio_T.clamp(0.8, 1.2) * advantage)
        away_T = torch.as_tensor(answer.reference_T).double() - logprob_T
        terms.append((-gain_T + 0.1 * (away_T.exp() - away_T - 1)).mean())
    expected = torch.stack(terms).mean()
    expected.backward()
    model = tiny_model("qwen3").train()
    policy = Policy(model, CPU, FLOAT32)
    assert policy.probe(layouts=(kind,)) == []
    loss, _ = run_step(policy, Grpo(beta=0.1, loss_type="grpo", unbiased_kl=False), group, policy.rows(group, 64))
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    assert_same_gradients(gradients(model), gradients(plain))


def test_the_policy_as_it_is_has_ratio_one() -> None:
    """Without old log-probabilities: as with those of the policy itself."""
    model = tiny_model("qwen3").train()
    policy = Policy(model, CPU, FLOAT32)
    policy.probe()
    group = with_old(tiny_model("qwen3"), experiences(2, 3, model.config.vocab_size), noise=0.0)
    fresh = bare(group)
    loss, _ = run_step(policy, Grpo(), group, policy.rows(group, 64))
    wanted = gradients(model)
    model.zero_grad()
    again, _ = run_step(policy, Grpo(), fresh, policy.rows(fresh, 64))
    assert again == pytest.approx(loss, abs=1e-6)
    assert_same_gradients(gradients(model), wanted, tolerance=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(2, 5), st.integers(1, 200), st.sampled_from(["tree", "packed", "padded"]))
def test_however_rows_are_split(prompts: int, answers: int, budget: int, kind: Kind) -> None:
    group = experiences(prompts, answers, 20, seed=prompts * 7 + answers, all_count=False)
    objective = Grpo(beta=0.05, loss_type="grpo", level="sequence")
    found = []
    for rows in (lay_out(group, "padded", budget_tokens=100_000), lay_out(group, kind, budget_tokens=budget)):
        model = Bigrams(20, 1)
        loss, _ = run_step(model, objective, group, rows)
        found.append((loss, model.table_VV.grad))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)


def bare(group: Sequence[Experience]) -> list[Experience]:
    """Answers of which nothing is known but how good they are."""
    return [
        Experience(e.row_id, e.segments, answers=tuple(Answer(a.reward, a.advantage_T) for a in e.answers))
        for e in group
    ]


def test_what_it_cannot_do_without() -> None:
    with pytest.raises(ValueError, match="rollout"):
        Grpo().prepare(StepLogprobs([single("a", [1, 2], [0, 1])]))
    with pytest.raises(ValueError, match="beta"):
        Grpo(beta=0.1).prepare(StepLogprobs(bare(experiences(1, 2, 9))))
