"""Steps over pairs: what the tests of every objective on preferences share.

moved, gradients            a model some way from where it began; what a backward pass left
run_step, assert_like       an objective over rows, its gradients; held to those wanted
Bigrams, Fixed              a language model and a reference small enough to be asked thousands of times
pair_of_batch               a pair from a batch of TRL's
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from families import tiny_model
from steps import CPU, FLOAT32, assert_same_gradients, gradients, step_sums
from tunedock.data.layout import Kind, Row
from tunedock.data.sample import Sample, Segment
from tunedock.model.policy import Policy
from tunedock.model.reference import Reference
from tunedock.objective.base import Objective

LENGTHS = st.tuples(st.integers(0, 12), st.integers(1, 9), st.integers(1, 9))
"""Tokens of a prompt and of two completions."""


def moved(model: nn.Module, seed: int = 11) -> nn.Module:
    """The model some way from where it began."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def run_step(
    policy: Policy, reference: Reference | None, objective: Objective, group: Sequence[Sample], rows: Sequence[Row]
) -> tuple[float, dict[str, float]]:
    """Loss and metrics of a step over pairs, its gradients left in the model."""
    loss, sums = step_sums(policy, objective, group, rows, reference)
    assert all(of == len(group) for name, (_, of) in sums.items() if name != "nll_loss"), "each pair counts once"
    return loss, {name: total / of for name, (total, of) in sums.items()}


def backward(model: nn.Module, compute: Callable[[], Tensor]) -> tuple[float, dict[str, Tensor]]:
    """A loss and its gradients."""
    model.zero_grad()
    loss = compute()
    loss.backward()
    return float(loss.detach()), gradients(model)


@cache
def moved_policy(kind: Kind, *, back: bool = False) -> tuple[Policy, Reference]:
    """The tiny model some way from where it began, in one layout; and where it began. `back`: the other way, from there."""
    model = moved(tiny_model("qwen3")) if back else tiny_model("qwen3")
    model.train()
    policy = Policy(model, CPU, FLOAT32)
    assert policy.probe(layouts=(kind,)) == []
    reference = Reference.of(policy)
    model.load_state_dict((tiny_model("qwen3") if back else moved(tiny_model("qwen3"))).state_dict())
    return policy, reference


def assert_like(
    wanted: tuple[float, dict[str, Tensor]], objective: Objective, group: Sequence[Sample], kind: Kind, budget: int
) -> dict[str, float]:
    """Loss and gradients of every parameter of the moved model are those; returns the metrics."""
    policy, reference = moved_policy(kind)
    policy.model.zero_grad()
    rows = policy.rows(group, budget)
    loss, metrics = run_step(policy, reference if objective.needs_reference else None, objective, group, rows)
    assert loss == pytest.approx(wanted[0], rel=1e-5, abs=1e-6)
    assert_same_gradients(gradients(policy.model), wanted[1], tolerance=1e-5)
    return metrics


class Fixed:
    """A reference whose figures are given."""

    def __init__(self, leaves_S2: Tensor) -> None:
        self._leaves_S2 = leaves_S2

    def leaf_logprobs(self, samples: Sequence[Sample], rows: Sequence[Row], *, remember: bool = True) -> Tensor:
        return self._leaves_S2


def pair_of_batch(batch: dict[str, Tensor], chosen: int, rejected: int) -> Sample:
    """A pair from TRL's padded batch, whose first half is chosen and second half rejected."""

    def line(n: int) -> tuple[np.ndarray, np.ndarray]:
        here = batch["attention_mask"][n].bool()
        ids, mask = batch["input_ids"][n][here], batch["completion_mask"][n][here]
        return ids.numpy().astype(np.int32), mask.numpy().astype(np.float32)

    return two_leaves(f"pair {chosen}", line(chosen), line(rejected))


def labelled_pairs(batch: dict[str, Tensor]) -> list[Sample]:
    """The pairs of a batch whose labels are -100 where nothing is trained (TRL's CPO and ORPO)."""

    def line(side: str, n: int) -> tuple[np.ndarray, np.ndarray]:
        here = batch[f"{side}_attention_mask"][n].bool()
        ids, labels = batch[f"{side}_input_ids"][n][here], batch[f"{side}_labels"][n][here]
        return ids.numpy().astype(np.int32), (labels != -100).numpy().astype(np.float32)

    return [two_leaves(f"pair {n}", line("chosen", n), line("rejected", n)) for n in range(len(batch["chosen_labels"]))]


def two_leaves(row_id: str, *paths: tuple[np.ndarray, np.ndarray]) -> Sample:
    shared = int(paths[0][1].argmax())
    assert (paths[0][0][:shared] == paths[1][0][:shared]).all()
    leaves = (Segment(ids[shared:], weights[shared:], 0) for ids, weights in paths)
    return Sample(row_id, (Segment(paths[0][0][:shared], np.zeros(shared, np.float32)), *leaves))


def as_text(rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """The rows without turns, which TRL's older trainers put together themselves."""
    return [{name: turns[0]["content"] + " " * (name == "prompt") for name, turns in row.items()} for row in rows]


PREFERENCES = [
    {
        "prompt": [{"role": "user", "content": f"How many hours are in {n} days?"}],
        "chosen": [{"role": "assistant", "content": f"There are {24 * n} hours in {n} days."}],
        "rejected": [{"role": "assistant", "content": "I do not know." * (n % 2 + 1)}],
    }
    for n in range(2, 6)
]
"""Rows as TRL reads them."""
