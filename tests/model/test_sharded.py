"""A model sharded over two processes, by FSDP2 or ZeRO-3, gives the loss and gradients it gives whole: the head is part of its one
call."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS / "train"))  # the samples are those of the exactness tests

from sharded_model import count_of, group, make  # noqa: E402


def whole(kind: str) -> tuple[float, dict[str, float]]:
    policy, loss = make(kind), 0.0
    for row in policy.rows(group(), 4096):
        logprob_N, tensors = policy.logprobs(row)
        share = -(tensors.weight_N * logprob_N).sum() / count_of(group())
        share.backward()
        loss += float(share.detach())
    return loss, {name: float(p.grad.norm()) for name, p in policy.model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def extensions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where DeepSpeed builds what it needs. In the user's folder a build that was killed leaves a lock all later ones wait for."""
    return tmp_path_factory.mktemp("extensions")


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize(
    "by",
    ["fsdp2", pytest.param("zero3", marks=[pytest.mark.long, pytest.mark.timeout(900)])],  # its build takes two minutes
)
def test_loss_and_gradients_of_a_sharded_model(by: str, kind: str, extensions: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).with_name("sharded_rank.py")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (TESTS, TESTS / "train", TESTS / "model"))),
        "TORCH_EXTENSIONS_DIR": str(extensions),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(script), str(rank), str(port), by, kind],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    try:
        ended = [rank.communicate(timeout=400) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], ended[0][1] + ended[1][1]
    loss, norms = whole(kind)
    for said, _ in ended:
        got = json.loads(said.splitlines()[-1])
        assert got["loss"] == pytest.approx(loss, rel=1e-5)
        assert got["norms"] == pytest.approx(norms, rel=1e-4)
