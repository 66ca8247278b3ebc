"""Two machines for real: two network namespaces with an address each, a cable between them, and `tunedock train` on both.

What is trained is the demo's model, over gloo. The losses are those of one process, whatever happens to a machine or the cable.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo_training import assert_the_same, command, losses_alone
from tunedock.run.pulse import read_beat
from tunedock.run.ranks import RankFiles
from tunedock.run.record import Run

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

ADDRESSES = ("10.231.7.1", "10.231.7.2")
TIMEOUT_S = 20


class Machines:
    """Two namespaces, each with `eth0` at the end of one cable."""

    def __init__(self) -> None:
        self.names = [f"tunedock-{os.getpid()}-{node}" for node in range(2)]

    def make(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
        ends = [f"td{os.getpid()}{node}"[:15] for node in range(2)]
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for name, end, address in zip(self.names, ends, ADDRESSES, strict=True):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "link", "set", end, "name", "eth0")
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", name, "link", "set", device, "up")

    def cable(self, state: str) -> None:
        ip("-n", self.names[0], "link", "set", "eth0", state)

    def switch_off(self, node: int) -> None:
        """Ends all that runs on one of them, at once."""
        for pid in ip("netns", "pids", self.names[node]).split():
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                continue

    def remove(self) -> None:
        for node, name in enumerate(self.names):
            if name in subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout:
                self.switch_off(node)
                ip("netns", "delete", name)


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True).stdout


@pytest.fixture
def machines() -> Iterator[Machines]:
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces take root on Linux, and iproute2")
    made = Machines()
    try:
        made.make()
    except subprocess.CalledProcessError as error:
        made.remove()
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
    try:
        yield made
    finally:
        made.remove()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    return losses_alone(tmp_path_factory.mktemp("alone"))


class Node:
    """`tunedock train` on one of the machines."""

    def __init__(self, machines: Machines, node: int, folder: Path) -> None:
        settings = [
            "launch.nodes=2", "launch.processes=1", f"launch.rendezvous={ADDRESSES[0]}:29500", f"launch.node_rank={node}",
            f"launch.timeout_s={TIMEOUT_S}", "launch.nccl.interface=eth0", "launch.max_restarts=6",
        ]  # fmt: skip
        self._said = (folder / f"node-{node}.{time.monotonic_ns()}.txt").open("w+")
        line = ["ip", "netns", "exec", machines.names[node], *command(folder, *settings)]
        self._process = subprocess.Popen(line, cwd=folder, stdout=self._said, stderr=self._said)

    def end(self) -> int:
        return self._process.wait(400)

    def said(self) -> str:
        self._said.flush()
        return Path(self._said.name).read_text(encoding="utf-8", errors="replace")


def at_step(run: Run, step: int) -> None:
    deadline = time.monotonic() + 180
    while (beat := read_beat(RankFiles(run.ranks, 1).pulse)) is None or beat.step < step:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def assert_finished(nodes: list[Node], folder: Path, alone: dict[int, float]) -> None:
    assert [node.end() for node in nodes] == [0, 0], "\n".join(node.said() for node in nodes)
    assert_the_same(Run(folder / "run"), alone)


def test_two_machines_train_what_one_process_trains(
    machines: Machines, tmp_path: Path, alone: dict[int, float]
) -> None:
    nodes = [Node(machines, node, tmp_path) for node in range(2)]
    assert_finished(nodes, tmp_path, alone)
    assert "2 processes on 2 nodes" in nodes[0].said()


def test_a_machine_that_is_switched_off_is_named_and_comes_back(
    machines: Machines, tmp_path: Path, alone: dict[int, float]
) -> None:
    nodes = [Node(machines, node, tmp_path) for node in range(2)]
    at_step(Run(tmp_path / "run"), 8)
    machines.switch_off(1)
    nodes[1].end()
    nodes[1] = Node(machines, 1, tmp_path)
    assert_finished(nodes, tmp_path, alone)
    said = nodes[0].said()
    assert "node 1 (" in said and "is gone, with rank 1" in said and "training goes on from step" in said


def test_a_cable_that_is_pulled_and_put_back_costs_a_restart(
    machines: Machines, tmp_path: Path, alone: dict[int, float]
) -> None:
    nodes = [Node(machines, node, tmp_path) for node in range(2)]
    at_step(Run(tmp_path / "run"), 8)
    machines.cable("down")
    time.sleep(TIMEOUT_S + 10)
    machines.cable("up")
    assert_finished(nodes, tmp_path, alone)
    assert "for 20 s" in nodes[0].said() and "training goes on from step" in nodes[0].said()
