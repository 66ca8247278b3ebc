"""float32 products: fast ones are used only where they are as accurate."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tunedock.model import products
from tunedock.model.products import ACCURATE, use_fast_float32

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def test_what_is_used_is_accurate() -> None:
    used = use_fast_float32(CPU)
    assert torch.get_float32_matmul_precision() == ("medium" if used else "highest")
    a, b = torch.randn(300, 500), torch.randn(500, 200)
    exact = a.double() @ b.double()
    assert float(((a @ b).double() - exact).abs().max() / exact.abs().max()) <= 2 * ACCURATE


def test_products_that_lose_digits_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a backend rounds the operands to bfloat16."""
    rounded = products._error

    def worse(device: torch.device) -> float:
        a, b = torch.randn(64, 64), torch.randn(64, 64)
        exact = a.double() @ b.double()
        lossy = float(((a.bfloat16() @ b.bfloat16()).double() - exact).abs().max() / exact.abs().max())
        return max(lossy, rounded(device))

    monkeypatch.setattr(products, "_error", worse)
    assert not use_fast_float32(CPU)
    assert torch.get_float32_matmul_precision() == "highest"
