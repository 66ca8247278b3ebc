"""Answers made and scored by several ranks are those of one, and what one of them cannot score is no one else's deadlock."""

from __future__ import annotations

from pathlib import Path

import pytest

from many_ranks import said_by_ranks


def test_every_rank_has_all_answers_and_figures_and_each_others_errors(tmp_path: Path) -> None:
    first, second = said_by_ranks(Path(__file__).with_name("judged_rank.py"), tmp_path, 2)
    assert first == second
    assert first["ids"] == [[[n], [n]] for n in range(5)]
    assert first["rewards"] == [[1.0, 1.0], [3.0, 3.0], [2.0, 2.0], [7.0, 7.0], [4.0, 4.0]]
    told = {name: total / of for name, (total, of) in first["told"].items()}
    assert told["rewards/some"] == pytest.approx((1 + 2 + 4) / 3), "of the answers it scored, whoever made them"
    assert told["rewards/some/skipped"] == pytest.approx(2 / 5)
    assert "rewards/all/skipped" not in told
    assert first["error"] == ["RewardError", "d:3"]
    assert first["in step"] == [0, 1]
