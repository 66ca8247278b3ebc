"""What ranks tell each other comes to all of them; alone, every call is as if there were no others."""

from __future__ import annotations

from pathlib import Path

import torch

from many_ranks import said_by_ranks
from tunedock.data.layout import lay_out
from tunedock.data.sample import single
from tunedock.model import world


def test_alone_nothing_is_asked_of_anybody() -> None:
    with world.joined(timeout_s=1) as own:
        assert own.leads and own.world == world.size() == 1
        assert not world.together()
    assert world.agree(True) and not world.agree(False)
    assert world.least(7) == 7
    assert world.told_by_all("x") == ["x"] and world.told_by_first(None) is None
    tensor = torch.ones(2)
    assert world.add_up(tensor) is tensor and world.joined_up(tensor) is tensor
    assert list(world.own_of(3)) == [0, 1, 2]
    assert world.in_order(3, [0, 1, 2], ["a", None, "c"]) == ["a", None, "c"]
    assert world.after_the_first_here(lambda: 3, name="n", leads=False) == 3
    world.wait_for_all()
    world.raise_together(None)
    rows = lay_out([single("a", [1, 2], [0.0, 1.0])], "tree", budget_tokens=9)
    assert world.share(rows) is rows


def test_three_ranks_hear_the_same(tmp_path: Path) -> None:
    said = said_by_ranks(Path(__file__).with_name("world_rank.py"), tmp_path, 3)
    for rank, one in enumerate(said):
        assert one.pop("rank") == [rank, 3, rank, 3]
        assert one.pop("own") == [[0, 3], [1, 4], [2]][rank]
        assert one == said[0]
    assert said[0] == {
        "agree": [True, False, True],
        "least": 8,
        "sum": [4.5, 4.5],
        "joined": [[1.0, 1.0], [2.0, 2.0], [2.0, 2.0]],
        "all": [{"你好": n, "text": "x" * n} for n in range(3)],
        "first": ["first", 0],
        "order": [[0, 0], [1, 1], [2, 2], [3, 0], [4, 1]],
        "tensors": {
            "a": ["torch.int64", [2, 3], [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]],
            "none": ["torch.float32", [0, 4], []],
            "b": ["torch.bfloat16", [], 0.10009765625],
        },
        "work": 0,
    }


def test_what_takes_long_is_waited_for_and_an_error_of_one_is_everybodys(tmp_path: Path) -> None:
    """Longer than a collective call may be: another machine prepares its data, the first rank reads a checkpoint."""
    first, second = said_by_ranks(Path(__file__).with_name("patient_rank.py"), tmp_path, 2)
    assert first == {"work": 0, "told": "read", "raised": ["RewardError", "no score", "row 3"], "in step": [0, 1]}
    assert second == {**first, "work": 1}
