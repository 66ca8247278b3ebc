"""The reward model's loss and gradients are those of its definition and of TRL, however a step is split into rows."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from families import tiny_model, tokenizer
from pairs import pair, pairs
from scored import SCORED, plain_scores, tiny_scorer
from tunedock.data.batch import RowTensors, to_device
from tunedock.data.layout import Kind, Row, lay_out
from tunedock.data.sample import Sample, Segment, single
from tunedock.model.adapter import attach
from tunedock.model.policy import Policy, Precision
from tunedock.objective.base import StepLogprobs
from tunedock.objective.evaluate import measure, step_terms
from tunedock.objective.reward import Reward
from tunedock.recipe.adapters import Freeze, Lora
from tunedock.recipe.objectives import reward

CPU = torch.device("cpu")
FLOAT32 = Precision(torch.float32, torch.float32)
LAYOUTS: tuple[Kind, ...] = ("tree", "packed", "padded")


def judged(count: int, vocabulary: int, *, margins: bool = True) -> list[Sample]:
    made = pairs(count, vocabulary)
    return [replace(s.weighed_at_ends(), margin=0.25 * n if margins else 0.0) for n, s in enumerate(made)]


def expected_loss(score_S2: Tensor, group: Sequence[Sample], centre: float) -> Tensor:
    """From the definition, in float64."""
    score_S2 = score_S2.double()
    margin_S = torch.tensor([sample.margin for sample in group], dtype=torch.float64)
    loss = -logsigmoid(score_S2[:, 0] - score_S2[:, 1] - margin_S).mean()
    return loss + centre * (score_S2.sum(1) ** 2).mean()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def run_step(
    policy: Any, objective: Reward, group: Sequence[Sample], rows: Sequence[Row]
) -> tuple[float, dict[str, float]]:
    """Loss and metrics of a step, its gradients left in the model."""
    loss = 0.0
    sums: dict[str, list[float]] = {}
    extremes: dict[str, float] = {}
    for terms in step_terms(policy, objective, group, rows):
        share = terms.loss / objective.count(group)
        share.backward()
        loss += float(share.detach())
        for name, (total, of) in terms.metrics.items():
            metric = sums.setdefault(name, [0.0, 0.0])
            metric[0] += float(total)
            metric[1] += float(of)
        extremes |= {name: min(float(v), extremes.get(name, float(v))) for name, v in terms.least.items()}
        extremes |= {name: max(float(v), extremes.get(name, float(v))) for name, v in terms.most.items()}
    assert sums["margin"][1] == sums["accuracy"][1] == sums["mean_reward"][1] / 2 == len(group)
    return loss, {name: total / of for name, (total, of) in sums.items()} | extremes


def assert_same_gradients(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """To 1e-5 of a tensor's largest gradient; where that is next to nothing beside the model's, its last digits are chance."""
    assert got.keys() == wanted.keys()
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    for name, gradient in wanted.items():
        scale = max(float(gradient.abs().max()), 1e-3 * largest)
        assert float((got[name] - gradient).abs().max()) / scale < 1e-5, name


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("family", SCORED)
def test_loss_and_gradients_are_those_of_plain_transformers(family: str, kind: Kind) -> None:
    """Path by path through the untouched model, for budgets that part pairs, share rows and hold all; all parameters trained."""
    plain = tiny_scorer(family).train()
    group = judged(5, plain.config.vocab_size)
    score_S2 = plain_scores(plain, group)
    expected = expected_loss(score_S2, group, 0.05)
    expected.backward()
    wanted, score_S2 = gradients(plain), score_S2.detach()
    gap_S = score_S2[:, 0] - score_S2[:, 1]
    model = tiny_scorer(family).train()
    policy = Policy(model, CPU, FLOAT32)
    assert policy.probe(layouts=(kind,)) == [] and policy.head == "score"
    assert "score.weight" in wanted and len(wanted) == len(list(plain.parameters()))
    for budget in (8, 48, 4096):
        model.zero_grad()
        loss, metrics = run_step(policy, Reward(0.05), group, policy.rows(group, budget))
        assert loss == pytest.approx(float(expected.detach()), rel=1e-6)
        assert_same_gradients(gradients(model), wanted)
        assert metrics == pytest.approx(
            {
                "accuracy": float((gap_S > 0).double().mean()),
                "margin": float(gap_S.mean()),
                "mean_reward": float(score_S2.mean()),
                "min_reward": float(score_S2.min()),
                "max_reward": float(score_S2.max()),
            },
            rel=1e-5,
            abs=1e-6,
        )


@pytest.mark.parametrize("adapter", [Lora(r=4, alpha=8), Freeze(last_n_layers=1)], ids=["lora", "freeze"])
def test_an_adapter_trains_the_score_layer_too(adapter: Any) -> None:
    def adapted() -> nn.Module:
        model = attach(tiny_scorer("qwen3"), adapter, seed=1).train()
        torch.manual_seed(2)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        return model

    plain, model = adapted(), adapted()
    group = judged(4, plain.config.vocab_size)
    expected_loss(plain_scores(plain, group), group, 0.0).backward()
    policy = Policy(model, CPU, FLOAT32)
    assert policy.probe() == [] and policy.layout == "tree"
    policy.model.train()
    run_step(policy, Reward(), group, policy.rows(group, 64))
    got = gradients(model)
    kinds = {"score" if "score" in name else "lora" if "lora" in name else "layer" for name in got}
    assert kinds == {"score", "lora" if isinstance(adapter, Lora) else "layer"}
    assert_same_gradients(got, gradients(plain))


class LastToken(nn.Module):
    """A real reward model that looks at one token: small enough to be asked thousands of times."""

    def __init__(self, vocabulary: int, seed: int) -> None:
        super().__init__()
        self.table_V = nn.Parameter(torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed)))
        self.calls = 0
        self.device = CPU

    def scores(self, row: Row) -> tuple[Tensor, RowTensors]:
        self.calls += 1
        tensors = to_device(row, CPU)
        return self.table_V[tensors.input_ids_BT.flatten()[tensors.own_N]], tensors


LENGTHS = st.tuples(st.integers(0, 12), st.integers(1, 9), st.integers(1, 9))


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(LENGTHS, min_size=1, max_size=7),
    budget=st.integers(1, 80),
    kind=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 99),
)
def test_however_rows_are_split(sizes: list[tuple[int, int, int]], budget: int, kind: Kind, seed: int) -> None:
    """Pairs of any shape, one of them twice, over any budget: same loss, same gradient, each pair counted once."""
    draw = np.random.default_rng(seed)
    group = [
        replace(pair(f"p:{n}", prompt + 1, *rest, draw, 20).weighed_at_ends(), margin=float(draw.normal()))
        for n, (prompt, *rest) in enumerate(sizes)
    ]
    group.append(group[0])
    model = LastToken(20, seed)
    ends = torch.tensor([[int(sample.segments[leaf].tokens_T[-1]) for leaf in (1, 2)] for sample in group])
    expected = expected_loss(model.table_V[ends], group, 0.1)
    (wanted,) = torch.autograd.grad(expected, [model.table_V])
    rows = lay_out(group, kind, budget_tokens=budget)
    loss, metrics = run_step(model, Reward(0.1), group, rows)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    torch.testing.assert_close(model.table_V.grad, wanted.float(), rtol=1e-4, atol=1e-6)
    scores = model.table_V.detach()[ends]
    assert (metrics["min_reward"], metrics["max_reward"]) == pytest.approx((float(scores.min()), float(scores.max())))


def test_only_rows_with_a_part_of_a_pair_are_read_first() -> None:
    draw = np.random.default_rng(0)
    group = [pair(f"{n}", 4, 20, 20, draw, 20).weighed_at_ends() for n in range(2)]
    model = LastToken(20, 0)
    rows = lay_out(group, "tree", budget_tokens=30)
    list(step_terms(model, Reward(), group, rows))
    assert model.calls == 2 * len(rows) == 8
    model.calls = 0
    list(step_terms(model, Reward(), group, lay_out(group, "tree", budget_tokens=500)))
    assert model.calls == 1


def test_measured_in_parts_and_whole() -> None:
    policy = Policy(tiny_scorer("qwen3"), CPU, FLOAT32)
    group = judged(7, policy.config.vocab_size)
    score_S2 = plain_scores(tiny_scorer("qwen3"), group).detach()
    for batch in (1, 3, 100):
        got = measure(policy, Reward(), group, lambda part: policy.rows(part, 40), batch=batch)
        assert (got.count, got.loss) == (7, pytest.approx(float(expected_loss(score_S2, group, 0.0)), rel=1e-5))
        assert got.metrics["max_reward"] == pytest.approx(float(score_S2.max()), rel=1e-5)
        assert got.metrics["min_reward"] == pytest.approx(float(score_S2.min()), rel=1e-5)


def test_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="two leaves"):
        Reward().prepare(StepLogprobs([single("a", [1, 2], [1.0, 1.0])]))
    causal = Policy(tiny_model("qwen3"), CPU, FLOAT32)
    group = judged(1, 20)
    with pytest.raises(RuntimeError, match="asked for scores, and this is a causal language model"):
        next(step_terms(causal, Reward(), group, causal.rows(group, 100)))


def test_the_recipe_makes_it() -> None:
    from tunedock.objective.registry import make

    assert make(reward.Reward(center_rewards_coefficient=0.01)) == Reward(0.01)


@pytest.mark.parametrize("family", ["qwen3", "llama3", "gemma3-text", "mistral"])
@pytest.mark.parametrize("centre", [None, 0.05])
def test_loss_and_gradients_are_those_of_trl(family: str, centre: float | None, tmp_path: object) -> None:
    """TRL's trainer makes the batch, the loss and the gradients; the same token ids and margins go through here."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    words = deepcopy(tokenizer("gemma" if family == "gemma3-text" else family))
    rows = [
        {
            "chosen": [
                {"role": "user", "content": f"How many hours are in {n} days?"},
                {"role": "assistant", "content": f"There are {24 * n} hours in {n} days."},
            ],
            "rejected": [
                {"role": "user", "content": f"How many hours are in {n} days?"},
                {"role": "assistant", "content": "I do not know." * (n % 2 + 1)},
            ],
            "margin": 0.3 * n,
        }
        for n in range(2, 6)
    ]
    theirs = tiny_scorer(family)
    if family == "mistral":  # its own is the end of the answer, which transformers then does not read
        words.pad_token = "<unk>"
        theirs.config.pad_token_id = words.pad_token_id
    trainer = RewardTrainer(
        model=theirs,
        args=RewardConfig(
            output_dir=str(tmp_path), per_device_train_batch_size=4, use_cpu=True, bf16=False,
            gradient_checkpointing=False, report_to="none", max_length=256, center_rewards_coefficient=centre,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=words,
    )  # fmt: skip
    batch = next(iter(trainer.get_train_dataloader()))
    theirs.train()
    expected = trainer.compute_loss(theirs, dict(batch))
    expected.backward()

    group = [_pair_of_batch(batch, n) for n in range(4)]
    assert sorted(sample.margin for sample in group) == pytest.approx([0.6, 0.9, 1.2, 1.5])
    model = tiny_scorer(family).train()
    policy = Policy(model, CPU, FLOAT32)
    policy.probe()
    loss, metrics = run_step(policy, Reward(centre or 0.0), group, policy.rows(group, 128))
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    assert_same_gradients(gradients(model), gradients(theirs))
    logged = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    for name, value in metrics.items():
        assert value == pytest.approx(logged[name], rel=1e-4, abs=1e-5), name


def _pair_of_batch(batch: dict[str, Tensor], number: int) -> Sample:
    """A pair from TRL's padded batch, whose first half is chosen and second half rejected."""
    ids = []
    for line in (number, number + len(batch["input_ids"]) // 2):
        here = batch["attention_mask"][line].bool()
        ids.append(batch["input_ids"][line][here].numpy().astype(np.int32))
    shared = int((ids[0][: min(map(len, ids))] == ids[1][: min(map(len, ids))]).argmin())
    nothing = np.zeros(1000, np.float32)
    leaves = (Segment(i[shared:], nothing[: len(i) - shared], 0) for i in ids)
    made = Sample(f"pair {number}", (Segment(ids[0][:shared], nothing[:shared]), *leaves))
    return replace(made.weighed_at_ends(), margin=float(batch["margin"][number]))
