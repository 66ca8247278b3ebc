"""RLOO's loss and gradients are those of TRL's trainer on the same batch, however a step is split into rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from trl import RLOOConfig, RLOOTrainer

from experiences import experiences, with_old
from families import tiny_model, tokenizer
from objective.test_grpo import padded
from steps import FLOAT32, assert_same_gradients, gradients, run_step
from tunedock.model.policy import Policy
from tunedock.objective.rloo import Rloo


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> RLOOTrainer:
    return RLOOTrainer(
        model=tiny_model("qwen3"),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=RLOOConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")),
            report_to=[],
            use_cpu=True,
            bf16=False,
            beta=0.0,
            num_generations=4,
            per_device_train_batch_size=8,
            activation_checkpointing=False,
        ),
        train_dataset=Dataset.from_list([{"prompt": "a"}] * 8),
        processing_class=tokenizer("qwen3"),
    )


@pytest.mark.parametrize("noise", [0.02, 0.2])
@pytest.mark.parametrize("bounds", [(0.2, None), (0.1, 0.4)])
def test_loss_and_gradients_are_those_of_trl(noise: float, bounds: tuple[float, float | None], trainer: Any) -> None:
    """Of answers of several tokens: their ratios spread far beyond the bounds with the larger noise."""
    low, high = bounds
    plain = tiny_model("qwen3")
    group = with_old(plain, experiences(3, 4, plain.config.vocab_size), noise=noise)
    batch = padded(group)
    batch["old_logps"] = (batch["old_per_token_logps"] * batch["completion_mask"]).sum(1)
    trainer.epsilon_low, trainer.epsilon_high = low, low if high is None else high
    trainer.model.zero_grad()
    expected: Tensor = trainer._compute_loss(trainer.model.train(), batch)
    expected.backward()
    wanted = gradients(trainer.model)
    model = tiny_model("qwen3").train()
    policy = Policy(model, torch.device("cpu"), FLOAT32)
    policy.probe()
    for budget in (8, 64, 4096):
        model.zero_grad()
        loss, _ = run_step(policy, Rloo(epsilon=low, epsilon_high=high), group, policy.rows(group, budget))
        assert loss == pytest.approx(float(expected.detach()), rel=1e-5, abs=1e-6)
        assert_same_gradients(gradients(model), wanted, tolerance=5e-5)
