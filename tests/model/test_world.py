"""What ranks tell each other comes to all of them; alone, every call is as if there were no others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

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
    world.wait_for_all("n")
    rows = lay_out([single("a", [1, 2], [0.0, 1.0])], "tree", budget_tokens=9)
    assert world.share(rows) is rows


def test_three_ranks_hear_the_same(tmp_path: Path) -> None:
    script = Path(__file__).with_name("world_rank.py")
    torchrun = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    ended = subprocess.run(
        [*torchrun, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    said = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
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
