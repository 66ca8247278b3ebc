"""SimPO's loss and gradients are TRL's (its CPO trainer's), with and without an SFT term, in every layout and split."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import logsigmoid

from families import tiny_model, tokenizer
from pair_steps import LENGTHS, PREFERENCES, as_text, assert_like, backward, labelled_pairs, moved
from pairs import pair
from steps import Bigrams, step_sums
from tunedock.data.layout import Kind, lay_out
from tunedock.objective.pairs import leaf_length
from tunedock.objective.simpo import Simpo


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from datasets import Dataset
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    made = CPOTrainer(
        model=moved(tiny_model("qwen3")).double(),
        args=CPOConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")), per_device_train_batch_size=4, use_cpu=True, bf16=False,
            gradient_checkpointing=False, report_to="none", max_length=256, loss_type="simpo", cpo_alpha=0.0,
            beta=2.5, simpo_gamma=0.8, remove_unused_columns=False,
        ),
        train_dataset=Dataset.from_list(as_text(PREFERENCES)),
        processing_class=tokenizer("qwen3"),
    )  # fmt: skip
    made.batch = next(iter(made.get_train_dataloader()))
    made.model.train()
    return made


@pytest.mark.parametrize(("kind", "budget"), [("tree", 4096), ("tree", 8), ("packed", 90), ("padded", 8)])
@pytest.mark.parametrize("sft_weight", [0.0, 0.7])
def test_value_and_gradients(trainer: Any, kind: Kind, budget: int, sft_weight: float) -> None:
    trainer.cpo_alpha = sft_weight
    wanted = backward(trainer.model, lambda: trainer.compute_loss(trainer.model, trainer.batch))
    metrics = assert_like(wanted, Simpo(2.5, 0.8, sft_weight), labelled_pairs(trainer.batch), kind, budget)
    _, logged = trainer.get_batch_loss_metrics(trainer.model, trainer.batch)
    assert len(metrics) == 6 + bool(sft_weight)
    for name, value in metrics.items():
        assert value == pytest.approx(logged[name], rel=1e-4, abs=1e-5), name


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(LENGTHS, min_size=1, max_size=6),
    budget=st.integers(1, 80),
    kind=st.sampled_from(["tree", "packed", "padded"]),
    seed=st.integers(0, 99),
    gamma=st.floats(0.0, 5.0),
    sft_weight=st.sampled_from([0.0, 0.01, 3.0]),
)
def test_however_rows_are_split(
    sizes: list[tuple[int, int, int]], budget: int, kind: Kind, seed: int, gamma: float, sft_weight: float
) -> None:
    draw = np.random.default_rng(seed)
    group = [pair(f"p:{n}", prompt + 1, *rest, draw, 20) for n, (prompt, *rest) in enumerate(sizes)]
    model = Bigrams(20, seed)
    length_S2 = torch.tensor([[leaf_length(sample, leaf) for leaf in (1, 2)] for sample in group], dtype=torch.float64)
    logp_S2 = torch.stack([torch.stack([model.of(sample, leaf) for leaf in (0, 1)]) for sample in group])
    mean_S2 = logp_S2 / length_S2
    nll = -logp_S2[:, 0].sum() / length_S2[:, 0].sum()
    expected = sft_weight * nll - logsigmoid(2.0 * (mean_S2[:, 0] - mean_S2[:, 1]) - gamma).mean()
    (wanted,) = torch.autograd.grad(expected, [model.table_VV])
    rows = lay_out(group, kind, budget_tokens=budget)
    loss, _ = step_sums(model, Simpo(simpo_gamma=gamma, sft_weight=sft_weight), group, rows)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    torch.testing.assert_close(model.table_VV.grad, wanted, rtol=1e-4, atol=1e-6)
