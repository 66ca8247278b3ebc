"""Ranks that hold the whole model each hold the same one."""

from __future__ import annotations

import os
from pathlib import Path

from many_ranks import said_by_ranks


def test_weights_that_another_rank_has_otherwise_are_named_trained_or_frozen(tmp_path: Path) -> None:
    first, second = said_by_ranks(Path(__file__).with_name("same_rank.py"), tmp_path, 2)
    assert first == second
    host = os.uname().nodename
    told = f"rank 1 on {host} has other weights than rank 0 on {host} | 0.weight"
    assert first == ["the same", told, f"{told} and 1 more"]
