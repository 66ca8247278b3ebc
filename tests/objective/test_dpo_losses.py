"""DPO's losses by name: TRL's values and gradients on its own batch, in every layout and split; and their formulas."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from families import tiny_model, tokenizer
from pair_steps import PREFERENCES, assert_like, backward, moved, pair_of_batch
from tunedock.data.layout import Kind
from tunedock.data.sample import Sample
from tunedock.objective.dpo import Dpo
from tunedock.objective.dpo_losses import LOSSES, discopop, sigmoid
from tunedock.objective.orpo import log_odds
from tunedock.recipe.objectives import preference

SMOOTHING = {"robust": 0.2, "exo_pair": 0.1}


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """TRL's trainer in float64: the settings of a loss are read when it is computed, so one trainer serves all."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    made = DPOTrainer(
        model=moved(tiny_model("qwen3")).double(),
        ref_model=tiny_model("qwen3").double(),
        args=DPOConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")), per_device_train_batch_size=4, use_cpu=True, bf16=False,
            gradient_checkpointing=False, report_to="none", max_length=256,
        ),
        train_dataset=Dataset.from_list(PREFERENCES),
        processing_class=tokenizer("qwen3"),
    )  # fmt: skip
    made.batch = next(iter(made.get_train_dataloader()))
    made.model.train()
    return made


def of_trl(trainer: Any, beta: float, smoothing: float, losses: dict[str, float]) -> tuple[float, dict[str, Tensor]]:
    trainer.beta, trainer.label_smoothing = beta, smoothing
    trainer.loss_types, trainer.loss_weights = list(losses), list(losses.values())
    return backward(trainer.model, lambda: trainer.compute_loss(trainer.model, trainer.batch))


def group_of(trainer: Any) -> list[Sample]:
    return [pair_of_batch(trainer.batch, n, n + 4) for n in range(4)]


WAYS: list[tuple[Kind, int]] = [("tree", 4096), ("packed", 90), ("padded", 8)]
"""Trees whole, packed rows that hold some pairs, padded rows with a path each."""


@pytest.mark.parametrize(("number", "name"), list(enumerate(LOSSES)))
def test_value_and_gradients_are_trls(trainer: Any, number: int, name: str) -> None:
    """In trees whose pairs are parted, and one way more; the first in every way."""
    beta, smoothing = 0.25, SMOOTHING.get(name, 0.0)
    wanted = of_trl(trainer, beta, smoothing, {name: 1.0})
    logged = {key: values[-1] for key, values in trainer._metrics["train"].items()}
    objective = Dpo(beta, name, smoothing)
    for kind, budget in [("tree", 8), *(WAYS[number % 3 :][:1] if number else WAYS)]:
        metrics = assert_like(wanted, objective, group_of(trainer), kind, budget)
        assert len(metrics) == 6
        for key, value in metrics.items():
            assert value == pytest.approx(logged[key], rel=1e-4, abs=1e-5), key


@pytest.mark.parametrize(("kind", "budget"), [("tree", 8), ("packed", 90), ("padded", 4096)])
def test_the_sft_term_is_trls(trainer: Any, kind: Kind, budget: int) -> None:
    wanted = of_trl(trainer, 0.25, 0.0, {"sigmoid": 1.0, "sft": 0.7})
    metrics = assert_like(wanted, Dpo(0.25, sft_weight=0.7), group_of(trainer), kind, budget)
    only = of_trl(trainer, 0.25, 0.0, {"sft": 1.0})
    assert metrics["nll_loss"] == pytest.approx(only[0], rel=1e-5)


def test_the_recipe_names_every_loss() -> None:
    assert set(get_args(preference.Dpo.model_fields["loss_type"].annotation)) == LOSSES.keys()


def ratios() -> Tensor:
    return torch.linspace(-60.0, 60.0, 41, dtype=torch.float64).reshape(-1, 1) * torch.tensor([[1.0, -0.7]])


def test_smoothing_of_the_plain_loss_is_mitchells() -> None:
    margin_S = 0.3 * (ratios()[:, 0] - ratios()[:, 1])
    expected = -(0.9 * logsigmoid(margin_S) + 0.1 * logsigmoid(-margin_S))
    torch.testing.assert_close(sigmoid(ratios(), 0.3, 0.1), expected)


def test_discopop_is_its_formula_where_that_can_be_computed_and_finite_elsewhere() -> None:
    margin_S = 0.1 * (ratios()[:, 0] - ratios()[:, 1])
    share_S = torch.sigmoid(margin_S / 0.05)
    expected = -logsigmoid(margin_S) * (1 - share_S) + torch.exp(-margin_S) * share_S
    torch.testing.assert_close(discopop(ratios(), 0.1, 0.0), expected)
    assert torch.isfinite(discopop(100 * ratios(), 1.0, 0.0)).all()


@pytest.mark.parametrize("name", LOSSES)
def test_a_preferred_chosen_answer_costs_less(name: str) -> None:
    """Around the start, where both log-ratios are small."""
    smoothing = SMOOTHING.get(name, 0.0)
    ratio_S2 = torch.tensor([[0.3, -0.3], [0.0, 0.0], [-0.3, 0.3]], dtype=torch.float64)
    far = 100.0 if name == "discopop" else 1.0  # it is not convex, and rises for a little way above zero
    right, level, wrong = LOSSES[name](far * ratio_S2, 0.1, smoothing).tolist()
    # apo_down lowers the chosen answer too, and the rejected one more.
    assert right < wrong and (right < level < wrong or name == "apo_down")


def test_log_odds_at_both_ends() -> None:
    logp = torch.tensor([-1e-9, -1e-4, -0.5, -0.8, -30.0, -800.0], dtype=torch.float64, requires_grad=True)
    got = log_odds(logp)
    expected = [math.log(1e7), math.log((1 - 1e-4) / 1e-4), math.log(math.exp(-0.5) / (1 - math.exp(-0.5)))]
    assert got[:3].tolist() == pytest.approx(expected, rel=1e-4)
    assert got[4:].tolist() == pytest.approx([-30.0, -800.0])
    assert torch.isfinite(torch.autograd.grad(got.sum(), logp)[0]).all()
