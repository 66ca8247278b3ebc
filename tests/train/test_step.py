"""The rows of a step over several ranks: whatever ends it on one, ends it on all at the same row."""

from __future__ import annotations

from pathlib import Path

import pytest

from many_ranks import said_by_ranks


def test_memory_that_runs_out_on_one_rank_and_a_stop_end_the_step_on_all(tmp_path: Path) -> None:
    """The next collective call is then the same one again: nobody takes one's want of memory for another's stop."""
    first, second = said_by_ranks(Path(__file__).with_name("step_rank.py"), tmp_path, 2)
    assert first.pop("elsewhere") and not second.pop("elsewhere")
    assert first == second
    assert first.pop("loss") == pytest.approx(second["loss"]) and second["loss"] > 0
    assert first == {"short": True, "agreed": True, "stopped": True, "in step": [0, 1]}
