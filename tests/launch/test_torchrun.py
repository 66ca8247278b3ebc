"""torchrun's arguments and its workers' environment, by the recipe."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tunedock.launch.process import worker_environment
from tunedock.launch.torchrun import Crew, nccl_environment, rank_settings, torchrun_command
from tunedock.recipe.launch import Launch, Nccl


def crew(processes: int = 4, node: int = 0, **launch: Any) -> Crew:
    return Crew(Launch.model_validate(launch), processes, node)


def test_the_command_of_one_machine() -> None:
    run, request = Path("/runs/r1"), Path("/runs/r1/ranks/node-0.request.json")
    given = torchrun_command(
        crew(grace_s=12.0), ["python", "w.py"], address="127.0.0.1", port=5, name="n", run=run, request=request
    )
    assert given == [
        sys.executable, "-P", "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", "4", "--node-rank", "0",
        "--rdzv-backend", "static", "--rdzv-endpoint", "127.0.0.1:5", "--rdzv-id", "n", "--rdzv-conf", "timeout=600",
        "--log-dir", "/dev/null", "--max-restarts", "0", "--monitor-interval", "0.2", "--shutdown-timeout", "12",
        "--no-python", "python", "w.py", "train", "/runs/r1", "--request", "/runs/r1/ranks/node-0.request.json",
    ]  # fmt: skip


def test_the_command_of_one_of_several() -> None:
    second = crew(2, 1, nodes=3, rendezvous="[fd00::1]:29500")
    given = torchrun_command(second, ["w"], address="fd00::1", port=7, name="n", run=Path("r"), request=Path("q"))
    assert given[given.index("--node-rank") + 1] == "1" and given[given.index("--nnodes") + 1] == "3"
    assert given[given.index("--rdzv-endpoint") + 1] == "[fd00::1]:7"
    assert (second.world, list(second.own), second.node_of(5)) == (6, [2, 3], 2)


SETTINGS: list[tuple[dict[str, Any], dict[str, str]]] = [
    ({}, {}),
    ({"interface": "eth0"}, {"NCCL_SOCKET_IFNAME": "eth0", "GLOO_SOCKET_IFNAME": "eth0"}),
    ({"interface": "^docker0,lo"}, {"NCCL_SOCKET_IFNAME": "^docker0,lo"}),
    ({"infiniband": "off"}, {"NCCL_IB_DISABLE": "1"}),
    ({"infiniband": True}, {"NCCL_IB_DISABLE": "0", "NCCL_NET": "IB"}),
    ({"hca": "mlx5_0"}, {"NCCL_IB_HCA": "mlx5_0"}),
    ({"p2p": False, "debug": "info"}, {"NCCL_P2P_DISABLE": "1", "NCCL_DEBUG": "INFO"}),
]


@pytest.mark.parametrize(("section", "environment"), SETTINGS)
def test_what_a_recipe_says_of_the_network(section: dict[str, Any], environment: dict[str, str]) -> None:
    assert nccl_environment(Nccl.model_validate(section)) == environment


def test_cores_are_shared_out_and_what_the_user_says_stays() -> None:
    four = crew(nccl={"interface": "eth0", "debug": "warn"})
    found = rank_settings(four, {"PATH": "/bin"}, cores=10)
    assert found.environment["OMP_NUM_THREADS"] == "2" and found.environment["PATH"] == "/bin" and not found.kept
    assert rank_settings(four, {}, cores=2).environment["OMP_NUM_THREADS"] == "1"
    ours = {"NCCL_SOCKET_IFNAME": "ib0", "NCCL_DEBUG": "WARN", "OMP_NUM_THREADS": "7"}
    told = rank_settings(four, ours, cores=8)
    assert told.environment == {**ours, "GLOO_SOCKET_IFNAME": "eth0"}
    assert told.kept == ("NCCL_SOCKET_IFNAME=ib0",), "what says the same is not told"


def test_a_worker_is_no_rank_of_somebody_elses() -> None:
    left = {
        "RANK": "3",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "3",
        "TORCHELASTIC_RUN_ID": "x",
        "MASTER_ADDR": "a",
        "HOME": "/h",
    }
    assert left.keys() & worker_environment(left).keys() == {"HOME"}
