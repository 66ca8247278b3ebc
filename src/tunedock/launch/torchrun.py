"""How torchrun is called: its arguments and the environment of its workers, by the recipe. Pure functions.

The static rendezvous: machines are numbered by us, and nothing is kept from an earlier start. torchrun restarts nothing itself: it
would do so on one machine without a word to the run, so a start that lost a process is ended, and `launch.supervise` starts anew.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tunedock.recipe.launch import Launch, Nccl

LOCAL = "127.0.0.1"
"""Where the processes of one machine meet. By its own name a container may not find itself."""


@dataclass(frozen=True, slots=True)
class Crew:
    """The processes of a training, as one machine sees them."""

    launch: Launch
    processes: int
    """On each machine."""
    node: int = 0

    @property
    def world(self) -> int:
        return self.launch.nodes * self.processes

    @property
    def own(self) -> range:
        """The ranks of this machine."""
        return range(self.node * self.processes, (self.node + 1) * self.processes)

    def node_of(self, rank: int) -> int:
        return rank // self.processes


def torchrun_command(
    crew: Crew, worker: Sequence[str], *, address: str, port: int, name: str, run: Path, request: Path
) -> list[str]:
    """`worker`: what is started, and takes a stage and a run; `address`, `port`: of torchrun's store on node 0; `name`: of this
    start."""
    launch = crew.launch
    where = f"[{address}]" if ":" in address else address
    return [
        *(sys.executable, "-P", "-m", "torch.distributed.run"),
        *("--nnodes", str(launch.nodes), "--nproc-per-node", str(crew.processes), "--node-rank", str(crew.node)),
        *("--rdzv-backend", "static", "--rdzv-endpoint", f"{where}:{port}", "--rdzv-id", name),
        *("--rdzv-conf", f"timeout={max(1, round(launch.timeout_s))}"),
        *("--log-dir", os.devnull),  # else each start leaves folders in /tmp, for logs that we keep ourselves
        *("--max-restarts", "0", "--monitor-interval", "0.2", "--shutdown-timeout", str(max(1, round(launch.grace_s)))),
        *("--no-python", *worker, "train", str(run), "--request", str(request)),
    ]


@dataclass(frozen=True, slots=True)
class Settings:
    """Of the workers' environment."""

    environment: dict[str, str]
    kept: tuple[str, ...]
    """What the user's own environment says otherwise than the recipe: it stays, and is told."""


def rank_settings(crew: Crew, ours: Mapping[str, str], *, cores: int | None = None) -> Settings:
    """What the recipe and the number of processes say, where our own environment does not say it already."""
    threads = max(1, (cores or len(os.sched_getaffinity(0))) // crew.processes)
    wanted = {**nccl_environment(crew.launch.nccl), "OMP_NUM_THREADS": str(threads)}
    kept = tuple(
        f"{name}={ours[name]}"
        for name, value in wanted.items()
        if name != "OMP_NUM_THREADS" and ours.get(name, value) != value
    )
    return Settings({**wanted, **ours}, kept)


def nccl_environment(nccl: Nccl) -> dict[str, str]:
    """Names: docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html. gloo carries what is on a CPU, and takes an interface's
    name alone."""
    found: dict[str, str] = {}
    if nccl.interface is not None:
        found["NCCL_SOCKET_IFNAME"] = nccl.interface
        if not nccl.interface.startswith(("^", "=")):
            found["GLOO_SOCKET_IFNAME"] = nccl.interface
    if nccl.infiniband == "off":
        found["NCCL_IB_DISABLE"] = "1"
    elif nccl.infiniband == "on":
        found |= {"NCCL_IB_DISABLE": "0", "NCCL_NET": "IB"}
    if nccl.hca is not None:
        found["NCCL_IB_HCA"] = nccl.hca
    if nccl.p2p == "off":
        found["NCCL_P2P_DISABLE"] = "1"
    if nccl.debug is not None:
        found["NCCL_DEBUG"] = nccl.debug.upper()
    return found
