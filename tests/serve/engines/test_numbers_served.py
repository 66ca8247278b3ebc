"""What products are computed in where nobody says."""

from __future__ import annotations

import pytest
import torch

from tunedock.serve.engines import precision
from tunedock.serve.engines.precision import usual

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("native", "unit", "parameters", "wanted"),
    [
        (False, False, 10, torch.float32),
        (True, True, 10, torch.bfloat16),
        (True, False, 10, torch.float32),
        (True, False, 101, torch.bfloat16),  # a third of the memory holds 100 numbers of four bytes
    ],
)
def test_of_a_cpu(
    monkeypatch: pytest.MonkeyPatch, native: bool, unit: bool, parameters: int, wanted: torch.dtype
) -> None:
    monkeypatch.setattr(precision, "has_bf16", lambda device: native)
    monkeypatch.setattr(precision, "cpu_has_bf16_unit", lambda: unit)
    monkeypatch.setattr(precision, "host_bytes", lambda groups: 1200)
    assert usual(CPU, parameters) is wanted


def test_of_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_bf16", lambda device: True)
    assert usual(CUDA, 1) is torch.bfloat16
