"""A row that gives no numbers is on one rank alone, and all of them leave its step out: the same run as one process's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import LIMIT_S, assert_same_weights, begin, metrics, weights, workplace
from transformers import AutoTokenizer

from tunedock.run.record import Run

pytestmark = pytest.mark.long

SCRIPT = Path(__file__).with_name("diverging_rank.py")
TORCHRUN = ("-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--log-dir", os.devnull, "--nproc-per-node")


def diverged(folder: Path, way: str, what: str) -> Run:
    """By two ranks, or by one process where the way is `alone`."""
    run = begin(folder, way, *([] if way == "alone" else [f"parallel={way}"]))
    ids = AutoTokenizer.from_pretrained(folder / "base")("in 7 days", add_special_tokens=False)["input_ids"]
    tokens = [str(token) for token in ids[1:]]  # the first word has another token in the middle of a text
    command = [sys.executable, *([] if way == "alone" else [*TORCHRUN, "2"]), str(SCRIPT), str(run.path), what, *tokens]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "2000"}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, env=environment, check=False)
    assert ended.returncode == 0, ended.stderr[-6000:]
    return run


def told(run: Run) -> list[tuple[str, str]]:
    events = [json.loads(line) for line in run.events.read_text().splitlines()]
    return [(event["message"], event["where"]) for event in events if event["kind"] == "warning"]


@pytest.mark.parametrize(("what", "ways"), [("loss", ("fsdp", "zero3")), ("gradients", ("ddp", "zero2"))])
def test_what_is_no_number_on_one_rank_is_left_out_by_all(tmp_path: Path, what: str, ways: tuple[str, ...]) -> None:
    """Whose gradients alone are none, is not looked for among several ranks: each has other rows."""
    folder = workplace(tmp_path, "sft", on_divergence="skip")
    single = diverged(folder, "alone", what)
    ((message, where),) = told(single)
    assert where == "row rows.jsonl:7" and message.endswith("at step 1; its update is left out")
    for way in ways:
        run = diverged(folder, way, what)
        ((message, where),) = told(run)
        assert message.endswith("at step 1; its update is left out")
        assert where == ("row rows.jsonl:7" if what == "loss" else "no one row of step 1 by itself")
        assert [one["step"] for one in metrics(run)] == [one["step"] for one in metrics(single)]
        assert_same_weights(weights(run), weights(single), within=2e-4)
