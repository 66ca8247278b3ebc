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
from tunedock.data.batch import RowTensors, to_device
from tunedock.data.layout import Kind, Row
from tunedock.data.sample import Sample, Segment
from tunedock.model.policy import Policy, Precision
from tunedock.model.reference import Reference
from tunedock.objective.base import Objective
from tunedock.objective.evaluate import GivesLeaves, GivesLogprobs, LayOut, step_terms

CPU = torch.device("cpu")
FLOAT32 = Precision(torch.float32, torch.float32)
LENGTHS = st.tuples(st.integers(0, 12), st.integers(1, 9), st.integers(1, 9))
"""Tokens of a prompt and of two completions."""


def moved(model: nn.Module, seed: int = 11) -> nn.Module:
    """The model some way from where it began."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step_sums(
    policy: GivesLogprobs,
    objective: Objective,
    group: Sequence[Sample],
    rows: Sequence[Row],
    reference: GivesLeaves | None = None,
    lay_out: LayOut | None = None,
) -> tuple[float, dict[str, list[float]]]:
    """Loss of a step and the sums of its metrics, its gradients left in the model."""
    loss = 0.0
    sums: dict[str, list[float]] = {}
    for terms in step_terms(policy, objective, group, rows, reference, lay_out):
        share = terms.loss / objective.count(group)
        share.backward()
        loss += float(share.detach())
        for name, (total, of) in terms.metrics.items():
            metric = sums.setdefault(name, [0.0, 0.0])
            metric[0] += float(total)
            metric[1] += float(of)
    return loss, sums


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
    assert_same_gradients(gradients(policy.model), wanted[1])
    return metrics


def assert_same_gradients(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        scale = float(gradient.abs().max()) + 1e-9
        assert float((got[name] - gradient).abs().max()) / scale < tolerance, name


class Bigrams(nn.Module):
    """A real language model that looks one token back: small enough to be asked thousands of times."""

    def __init__(self, vocabulary: int, seed: int) -> None:
        super().__init__()
        self.table_VV = nn.Parameter(torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(seed)))
        self.calls = 0
        self.device = CPU
        self.values_N: Tensor | None = None

    def logprobs(self, row: Row) -> tuple[Tensor, RowTensors]:
        self.calls += 1
        tensors = to_device(row, CPU)
        before_N = tensors.input_ids_BT.flatten()[tensors.flat_N]
        return torch.log_softmax(self.table_VV, -1)[before_N, tensors.token_N], tensors

    def of(self, sample: Sample, leaf: int) -> Tensor:
        tokens, weights = sample.path(sample.leaves()[leaf])
        ids = torch.as_tensor(tokens, dtype=torch.int64)
        found = torch.log_softmax(self.table_VV, -1)[ids[:-1], ids[1:]].double()
        return (torch.as_tensor(weights[1:]) * found).sum()


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
