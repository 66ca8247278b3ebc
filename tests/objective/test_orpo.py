"""ORPO's loss and gradients: its odds ratio is TRL's, its likelihood the paper's, in every layout and split."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import logsigmoid

from families import tiny_model, tokenizer
from pair_steps import LENGTHS, PREFERENCES, as_text, assert_like, backward, labelled_pairs, moved
from pairs import pair
from steps import Bigrams, step_sums
from tunedock.data.layout import Kind, lay_out
from tunedock.objective.orpo import Orpo
from tunedock.objective.pairs import leaf_length


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from datasets import Dataset
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    made = ORPOTrainer(
        model=moved(tiny_model("qwen3")).double(),
        args=ORPOConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")), per_device_train_batch_size=4, use_cpu=True, bf16=False,
            gradient_checkpointing=False, report_to="none", max_length=256, beta=0.4, remove_unused_columns=False,
        ),
        train_dataset=Dataset.from_list(as_text(PREFERENCES)),
        processing_class=tokenizer("qwen3"),
    )  # fmt: skip
    made.batch = next(iter(made.get_train_dataloader()))
    made.model.train()
    return made


def of_the_paper(trainer: Any) -> Tensor:
    """TRL's pass and odds ratio; the likelihood over the chosen answers' tokens, in float64."""
    chosen, rejected, logits, *_ = trainer.concatenated_forward(trainer.model, trainer.batch)
    losses, *_ = trainer.odds_ratio_loss(chosen, rejected)
    labels = trainer.batch["chosen_labels"][:, 1:]
    logprobs = torch.log_softmax(logits.double(), -1)[:, : labels.shape[1]]
    own = logprobs.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return -own[labels != -100].mean() - losses.mean()


@pytest.mark.parametrize(("kind", "budget"), [("tree", 4096), ("tree", 8), ("packed", 90), ("padded", 8)])
def test_value_and_gradients(trainer: Any, kind: Kind, budget: int) -> None:
    wanted = backward(trainer.model, lambda: of_the_paper(trainer))
    metrics = assert_like(wanted, Orpo(0.4), labelled_pairs(trainer.batch), kind, budget)
    _, logged = trainer.get_batch_loss_metrics(trainer.model, trainer.batch)
    assert len(metrics) == 9
    for name, value in metrics.items():
        if name != "nll_loss":  # TRL's counts the prompt
            assert value == pytest.approx(logged[name], rel=1e-4, abs=1e-5), name


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(LENGTHS, min_size=1, max_size=6),
    budget=st.integers(1, 80),
    kind=st.sampled_from(["tree", "packed", "padded"]),
    seed=st.integers(0, 99),
    beta=st.floats(0.01, 5.0),
)
def test_however_rows_are_split(
    sizes: list[tuple[int, int, int]], budget: int, kind: Kind, seed: int, beta: float
) -> None:
    draw = np.random.default_rng(seed)
    group = [pair(f"p:{n}", prompt + 1, *rest, draw, 20) for n, (prompt, *rest) in enumerate(sizes)]
    model = Bigrams(20, seed)
    length_S2 = torch.tensor([[leaf_length(sample, leaf) for leaf in (1, 2)] for sample in group], dtype=torch.float64)
    logp_S2 = torch.stack([torch.stack([model.of(sample, leaf) for leaf in (0, 1)]) for sample in group])
    mean_S2 = logp_S2 / length_S2
    odds_S2 = torch.log(torch.exp(mean_S2) / (1 - torch.exp(mean_S2)))
    nll = -logp_S2[:, 0].sum() / length_S2[:, 0].sum()
    expected = nll - beta * logsigmoid(odds_S2[:, 0] - odds_S2[:, 1]).mean()
    (wanted,) = torch.autograd.grad(expected, [model.table_VV])
    loss, sums = step_sums(model, Orpo(beta), group, lay_out(group, kind, budget_tokens=budget))
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    assert sums["log_odds_ratio"][1] == len(group)
    assert sums["nll_loss"][0] / sums["nll_loss"][1] == pytest.approx(float(nll.detach()), rel=1e-5)
    torch.testing.assert_close(model.table_VV.grad, wanted, rtol=1e-4, atol=1e-6)


def test_an_answer_known_by_heart_has_finite_odds() -> None:
    """Where rounding makes every log-probability of an answer zero."""
    group = [pair("a", 4, 3, 3, np.random.default_rng(0), 20)]
    model = Bigrams(20, 0)
    model.table_VV.data *= 0
    ids = group[0].path(1)[0]
    for before, token in pairwise(ids):
        model.table_VV.data[int(before)] = -1e4
        model.table_VV.data[int(before), int(token)] = 0.0
    loss, _ = step_sums(model, Orpo(), group, lay_out(group, "tree", budget_tokens=100))
    assert np.isfinite(loss) and model.table_VV.grad is not None and torch.isfinite(model.table_VV.grad).all()
