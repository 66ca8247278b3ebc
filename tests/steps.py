"""One optimizer step's loss and gradients through the engine, and a language model small enough to be asked thousands of times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tunedock.data.batch import RowTensors, to_device
from tunedock.data.layout import Row
from tunedock.data.sample import Sample
from tunedock.model.policy import Precision
from tunedock.objective.base import Objective
from tunedock.objective.evaluate import GivesLeaves, LayOut, step_terms

CPU = torch.device("cpu")
FLOAT32 = Precision(torch.float32, torch.float32)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step_sums(
    policy: Any,
    objective: Objective,
    group: Sequence[Sample],
    rows: Sequence[Row],
    reference: GivesLeaves | None = None,
    lay_out: LayOut | None = None,
) -> tuple[float, dict[str, list[float]]]:
    """Loss of a step and the sums of its metrics, its gradients left in the model."""
    loss, count = 0.0, objective.count(group)
    sums: dict[str, list[float]] = {}
    for terms in step_terms(policy, objective, group, rows, reference, lay_out):
        share = terms.loss / count
        share.backward()
        loss += float(share.detach())
        for name, (total, of) in terms.metrics.items():
            metric = sums.setdefault(name, [0.0, 0.0])
            metric[0] += float(total)
            metric[1] += float(of)
    return loss, sums


def run_step(
    policy: Any, objective: Objective, group: Sequence[Sample], rows: Sequence[Row]
) -> tuple[float, dict[str, float]]:
    """Loss and metrics of a step of an objective without a reference, its gradients left in the model."""
    loss, sums = step_sums(policy, objective, group, rows)
    return loss, {name: total / max(of, 1e-12) for name, (total, of) in sums.items()}


def assert_same_gradients(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    """Relative to each tensor's largest, and for tensors far below the model's largest to a ten-thousandth of that."""
    assert got.keys() == wanted.keys()
    floor = 1e-4 * max(float(gradient.abs().max()) for gradient in wanted.values())
    for name, gradient in wanted.items():
        scale = max(float(gradient.abs().max()), floor) + 1e-12
        assert float((got[name] - gradient).abs().max()) / scale < tolerance, name


class Bigrams(nn.Module):
    """A real language model that looks one token back, with `values` a value head that does too."""

    def __init__(self, vocabulary: int, seed: int, *, values: bool = False) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.table_VV = nn.Parameter(torch.randn(vocabulary, vocabulary, generator=draw))
        self.worth_V = nn.Parameter(torch.randn(vocabulary, generator=draw)) if values else None
        self.device = CPU
        self.values_N: Tensor | None = None
        self.calls = 0

    def logprobs(self, row: Row) -> tuple[Tensor, RowTensors]:
        self.calls += 1
        tensors = to_device(row, CPU)
        before_N = tensors.input_ids_BT.flatten()[tensors.flat_N]
        self.values_N = None if self.worth_V is None else self.worth_V[before_N]
        return torch.log_softmax(self.table_VV, -1)[before_N, tensors.token_N], tensors

    def of(self, sample: Sample, leaf: int) -> Tensor:
        tokens, weights = sample.path(sample.leaves()[leaf])
        ids = torch.as_tensor(tokens, dtype=torch.int64)
        found = torch.log_softmax(self.table_VV, -1)[ids[:-1], ids[1:]].double()
        return (torch.as_tensor(weights[1:]) * found).sum()
