"""Products of few rows: those of the plain layer, and of each row the same to the bit whatever rows are beside it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tunedock.model.kernels import kernels
from tunedock.serve.engines.few_rows import MOST, ROUNDED, speed_up

pytestmark = pytest.mark.skipif(kernels() is None, reason="no compiled kernels here")


@pytest.mark.parametrize("dtype", MOST)
@pytest.mark.parametrize(("size", "columns", "bias"), [(64, 33, True), (16, 1, False), (512, 130, False)])
@torch.no_grad()
def test_as_the_plain_layer(dtype: torch.dtype, size: int, columns: int, bias: bool) -> None:
    torch.manual_seed(1)
    plain = nn.Linear(size, columns, bias=bias).to(dtype)
    fast = copy.deepcopy(plain)
    assert speed_up(fast) == 1 and speed_up(fast) == 0
    x = torch.randn(1, MOST[dtype] + 8, size).to(dtype)
    for rows in range(1, MOST[dtype] + 9):
        got, wanted = fast(x[:, :rows]), plain(x[:, :rows])
        assert got.dtype == dtype and got.shape == wanted.shape
        tolerance = 2e-5 if dtype == torch.float32 else ROUNDED
        assert float((got.float() - wanted.float()).abs().max()) <= tolerance * float(wanted.abs().max() + 1)
        if rows <= MOST[dtype]:
            assert torch.equal(got[:, -1], fast(x[:, rows - 1 : rows])[:, 0])


def test_what_is_left_alone() -> None:
    assert speed_up(nn.Linear(20, 16)) == 0, "no whole number of lanes"
    assert speed_up(nn.Linear(32, 16).double()) == 0
    replaced = nn.Linear(32, 16)
    replaced.forward = lambda x: x  # type: ignore[method-assign]
    assert speed_up(replaced) == 0
