"""Ranks on machines with different files do not train as if they were one."""

from __future__ import annotations

import os
from pathlib import Path

from many_ranks import said_by_ranks


def test_a_file_that_is_another_one_elsewhere_is_named_on_every_rank(tmp_path: Path) -> None:
    host = os.uname().nodename
    first, second = said_by_ranks(Path(__file__).with_name("data_rank.py"), tmp_path, 2)
    assert first == second
    assert first == ["the same", f"rank 1 on {host} has read other data than rank 0 on {host} | rows.jsonl"]
