"""`launch`: where a run is made, and over how many processes. None of it changes what is trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, NonNegativeInt, PositiveFloat, PositiveInt

from tunedock.recipe.container import Compose, Container
from tunedock.recipe.section import Section, switch

GROUP_MARGIN_S = 60.0
"""How much longer a collective waits than `launch.timeout_s`: what watches the ranks names the one that hangs, before the
others end for want of it."""


class Nccl(Section):
    """How the processes find each other's machines. What the environment says already stays, and is told."""

    interface: str | None = None
    """The network interface to the other nodes (`eth0`, `ib0`; `^docker0,lo` leaves some out): NCCL_SOCKET_IFNAME, and
    GLOO_SOCKET_IFNAME where it names one."""
    infiniband: Annotated[
        Literal["auto", "on", "off"], BeforeValidator(switch, json_schema_input_type=Literal["auto", "on", "off"])
    ] = "auto"
    """`off`: TCP although there are InfiniBand or RoCE cards (NCCL_IB_DISABLE); `on`: these cards, or none of the run."""
    hca: str | None = None
    """InfiniBand cards to use (`mlx5_0,mlx5_1`): NCCL_IB_HCA."""
    p2p: Annotated[Literal["auto", "off"], BeforeValidator(switch, json_schema_input_type=Literal["auto", "off"])] = (
        "auto"
    )
    """`off`: cards of one machine talk through its memory (NCCL_P2P_DISABLE), for machines where direct copies hang."""
    debug: Literal["version", "warn", "info", "trace"] | None = None
    """What NCCL prints into logs/train.log: NCCL_DEBUG."""


class Launch(Section):
    on: Literal["local", "docker", "compose"] = "local"
    """`local`: as processes of this machine; `docker`: in a container on it; `compose`: each node in a container on it, by a
    compose file. See docs/guides/containers.md."""
    image: str | None = None
    """The image of a container; by default the one that `tunedock image build` makes for this machine."""
    nodes: PositiveInt = 1
    """Machines, and with `on: compose` containers of this one. `tunedock train` is called on each machine, see
    docs/guides/many-processes.md."""
    processes: PositiveInt | None = None
    """Processes on each machine; one for each of its GPUs by default, and one on a CPU."""
    node_rank: NonNegativeInt | None = None
    """Which of the machines this one is, from 0. `tunedock train` says the other machines' commands when it is left out on the
    first."""
    rendezvous: str | None = None
    """`host:port` of node 0, where the machines meet: an address the others reach, and a port that is free there."""
    timeout_s: PositiveFloat = 600.0
    """How long the processes wait for each other before one counts as lost, in seconds."""
    grace_s: PositiveFloat = 30.0
    """Seconds from a SIGTERM to the SIGKILL that follows it: 30 is what Kubernetes gives. A training whose state cannot be saved in
    that time is refused before its first step."""
    max_restarts: NonNegativeInt = 3
    """How often in a row a run that lost a process, or whose process broke, goes on from its last checkpoint by itself; a new
    checkpoint makes the count begin anew. Said in the recipe, it holds for a plain SIGKILL too."""
    nccl: Nccl = Nccl()
    container: Container = Container()
    """What a container is given, where the run is in one; with `on: compose` each node's."""
    compose: Compose = Compose()

    @property
    def group_timeout_s(self) -> float:
        """What a process group is given as its time-out: the launcher's own comes first."""
        return self.timeout_s + GROUP_MARGIN_S

    def devices(self, gpus: int) -> int:
        """Processes in all, on machines with so many GPUs each."""
        return self.nodes * (self.processes or max(gpus, 1))
