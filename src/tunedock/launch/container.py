"""A stage of a run as the container it runs in: the body of the engine's `POST /containers/create`, a pure function.

Nothing here asks an engine or looks at the disk: what is there is told by `Machine`, what is shown by `Bind`s. Secrets are not in
it; their values are added when it is submitted (`with_variables`), to the environment and nowhere else.
"""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunedock import __version__
from tunedock.launch.job import JobSpec
from tunedock.launch.mounts import Bind, Caches
from tunedock.launch.needs import PLAIN
from tunedock.plan.shared_memory import shared_memory_bytes
from tunedock.recipe.container import Container, size_bytes
from tunedock.recipe.launch import Launch
from tunedock.recipe.schema import Recipe

LABEL = "tunedock."
"""What our labels begin with: `run` (its folder), `stage`, `version`, and the shares `cpus`, `memory`, `gpus`, `mps`."""

INITS = ("tini", "tini-static", "dumb-init", "catatonit", "docker-init")

INSIDE = ("python", "-P", "-m", "tunedock.launch.inside")

GRACE_MARGIN_S = 10
"""A stop by the engine waits longer than the run's own grace: what ends last is not the worker."""

MPS_PIPES = "/tmp/nvidia-mps"  # noqa: S108 - where NVIDIA's daemon has it
INFINIBAND = "/dev/infiniband"

SOURCE = "/opt/tunedock-source"
"""Where the caller's own tunedock stands with `source: true`: alone, or all that is installed beside it would come along."""

LOG = {"Type": "json-file", "Config": {"max-size": "10m", "max-file": "2"}}
"""Of the container itself: what the stage prints is in the run's own logs."""

FILES_OF_ROOT = ("CHOWN", "DAC_OVERRIDE", "FOWNER")
"""What a caller who is root may do to files outside, and so inside too."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What of the machine and of the caller matters to a container."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    """The caller's further groups."""
    user: str
    """The caller's name."""
    caches: Caches
    hostname: str
    source: str
    """The folder of this tunedock's package."""
    gpus: tuple[str, ...] = ()
    """The ids of those this run gets; () for none, `("all",)` for whatever there is."""
    infiniband: bool = False
    rootless: bool = False
    """Whether the engine runs as the caller, whose container's root is then the caller."""
    remapped: bool = False
    """Whether the engine gives containers user ids of their own (`userns-remap`)."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """The caller's."""


@dataclass(frozen=True, slots=True)
class Image:
    """What of an image matters to a container of it."""

    id: str
    entrypoint: tuple[str, ...] = ()

    @property
    def has_init(self) -> bool:
        """Whether it begins with a program that hands signals on and buries ended processes, as ours do; some set more before."""
        return bool(self.entrypoint) and Path(self.entrypoint[0]).name in INITS


def container_spec(
    job: JobSpec, recipe: Recipe, image: Image, machine: Machine, *, network: str, binds: Sequence[Bind]
) -> dict[str, Any]:
    """The body for the engine, `POST /containers/create`. `recipe` is resolved."""
    launch = job.launch or recipe.launch
    given = launch.container
    converses = job.stage == "chat"
    spec: dict[str, Any] = {
        "Image": image.id,
        "Entrypoint": list(image.entrypoint) if image.has_init else [],
        "Cmd": [*INSIDE, job.stage, "-" if job.run is None else str(job.run), *_part(job)],
        "User": _user(given, machine),
        "WorkingDir": "/" if job.run is None else str(job.run),
        "Env": [f"{name}={value}" for name, value in sorted(environment(launch, machine).items())],
        "Labels": labels(job, launch, machine),
        "StopTimeout": math.ceil(launch.grace_s) + GRACE_MARGIN_S,
        "Tty": False,
        "OpenStdin": converses,
        "StdinOnce": converses,
        "AttachStdin": converses,
        "AttachStdout": converses,
        "AttachStderr": converses,
        # A service's question whether it is well would take a core from the training each time; a run says itself how it is.
        "Healthcheck": {"Test": ["NONE"]},
        "HostConfig": {"Init": not image.has_init, **_host(launch, machine, network, binds)},
    }
    if network != "host":
        spec["Hostname"] = machine.hostname[:63]  # what a run says of its ranks
    return spec


def node_of(job: JobSpec) -> int:
    """Which node of several the job is; 0 for the first, and where there is one."""
    return 0 if job.launch is None else job.launch.node_rank or 0


def _part(job: JobSpec) -> list[str]:
    """Of a node beside the first: which it is, and where it meets the first."""
    node = node_of(job)
    return ["--node", str(node), "--meet", str(job.launch.rendezvous)] if job.launch is not None and node else []


def with_variables(spec: Mapping[str, Any], variables: Mapping[str, str]) -> dict[str, Any]:
    """The same with further variables: the moment before it is submitted."""
    return {**spec, "Env": [*spec["Env"], *(f"{name}={value}" for name, value in sorted(variables.items()))]}


def environment(launch: Launch, machine: Machine) -> dict[str, str]:
    """Variables that hold no secret."""
    home, caches = machine.caches.home, machine.caches
    found = {name: value for name, value in machine.environment.items() if PLAIN.fullmatch(name)}
    if launch.container.cpus is not None:
        found.setdefault("OMP_NUM_THREADS", str(max(1, int(launch.container.cpus))))
    found |= {
        "HOME": home,
        "USER": machine.user,  # an id without a name has none, and PyTorch's compiler asks for it
        "LOGNAME": machine.user,
        "HF_HOME": f"{home}/.huggingface",
        "HF_HUB_CACHE": str(caches.hub),
        "HF_TOKEN_PATH": str(caches.token),
        "MODELSCOPE_CACHE": str(caches.modelscope),
        "TORCHINDUCTOR_CACHE_DIR": str(caches.compiled / "inductor"),
        "TRITON_CACHE_DIR": str(caches.compiled / "triton"),
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    if launch.container.mps is not None:
        found["CUDA_MPS_PIPE_DIRECTORY"] = MPS_PIPES
        found["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] = str(launch.container.mps)
    found |= {name: value for name, equals, value in (text.partition("=") for text in launch.container.env) if equals}
    if launch.container.source:
        found["PYTHONPATH"] = ":".join(filter(None, (SOURCE, found.get("PYTHONPATH"))))
    return found


def labels(job: JobSpec, launch: Launch, machine: Machine) -> dict[str, str]:
    """What the container is, and what of the machine it was promised."""
    given = launch.container
    found = {"stage": job.stage, "version": __version__, "user": str(machine.uid)}
    if job.run is not None:
        found["run"] = str(job.run)
    if node_of(job):
        found["node"] = str(node_of(job))
    if given.cpus is not None:
        found["cpus"] = f"{given.cpus:g}"
    if given.memory is not None:
        found["memory"] = str(size_bytes(given.memory))
    if machine.gpus:
        found["gpus"] = ",".join(machine.gpus)
    if given.mps is not None:
        found["mps"] = str(given.mps)
    return {f"{LABEL}{name}": value for name, value in found.items()}


def container_name(job: JobSpec) -> str:
    """`tunedock-train-my-run-1f9c03`: a name that no other container has, and people can read."""
    run = "" if job.run is None else re.sub(r"[^A-Za-z0-9_.-]+", "-", job.run.name)[:48] + "-"
    return f"tunedock-{job.stage}-{run}{secrets.token_hex(3)}"


def _host(launch: Launch, machine: Machine, network: str, binds: Sequence[Bind]) -> dict[str, Any]:
    given = launch.container
    memory = None if given.memory is None else size_bytes(given.memory)
    infiniband = wants_infiniband(launch, machine)
    home = machine.caches.home
    tmpfs = dict.fromkeys(("/tmp", home, f"{home}/.cache"), "rw,exec,nosuid,nodev,mode=1777")  # noqa: S108
    host: dict[str, Any] = {
        "ReadonlyRootfs": given.read_only,
        "NetworkMode": network,
        "IpcMode": "private" if given.mps is None else "host",
        "ShmSize": _shm_bytes(launch, machine, memory),
        "Tmpfs": tmpfs,
        "Mounts": [bind.mount() for bind in (*binds, *_own_binds(given, machine))],
        "CapDrop": ["ALL"],
        "CapAdd": [*(FILES_OF_ROOT if _is_root(given, machine) else ()), *(("IPC_LOCK",) if infiniband else ())],
        "SecurityOpt": ["no-new-privileges"],
        "GroupAdd": [] if machine.rootless else [str(group) for group in machine.groups],
        "Devices": [_device(path) for path in (*given.devices, *((INFINIBAND,) if infiniband else ()))],
        "DeviceRequests": gpu_requests(machine.gpus),
        "Ulimits": _ulimits(given, infiniband),
        "LogConfig": LOG,
    }
    if memory is not None:
        host |= {"Memory": memory, "MemorySwap": memory}
    if given.cpus is not None:
        host["NanoCpus"] = round(given.cpus * 1e9)
    if given.runtime is not None:
        host["Runtime"] = given.runtime
    if machine.remapped:
        host["UsernsMode"] = "host"
    return host


def wants_infiniband(launch: Launch, machine: Machine) -> bool:
    asked = launch.container.infiniband
    return asked == "on" or (asked == "auto" and launch.nodes > 1 and machine.infiniband)


def _own_binds(given: Container, machine: Machine) -> list[Bind]:
    found = [Bind(machine.source, f"{SOURCE}/tunedock")] if given.source else []
    return [*found, Bind(MPS_PIPES, MPS_PIPES, read_only=False)] if given.mps is not None else found


def _user(given: Container, machine: Machine) -> str:
    if machine.rootless:
        return "0:0"
    return f"{machine.uid}:{machine.gid}" if given.user == "caller" else given.user


def _is_root(given: Container, machine: Machine) -> bool:
    return _user(given, machine).split(":")[0] == "0"


def _device(path: str) -> dict[str, str]:
    return {"PathOnHost": path, "PathInContainer": path, "CgroupPermissions": "rwm"}


def gpu_requests(gpus: tuple[str, ...]) -> list[dict[str, Any]]:
    if not gpus:
        return []
    which: dict[str, Any] = {"Count": -1} if gpus == ("all",) else {"DeviceIDs": list(gpus)}
    return [{"Driver": "", **which, "Capabilities": [["gpu", "utility", "compute"]]}]


def _ulimits(given: Container, infiniband: bool) -> list[dict[str, Any]]:
    limits = {**({"memlock": -1} if infiniband else {}), **given.ulimits}
    return [{"Name": name, "Soft": limit, "Hard": limit} for name, limit in sorted(limits.items())]


def _shm_bytes(launch: Launch, machine: Machine, memory: int | None) -> int:
    if launch.container.shm_size != "auto":
        return size_bytes(launch.container.shm_size)
    all_of_them = machine.gpus == ("all",)
    processes = launch.processes or (8 if all_of_them else len(machine.gpus)) or 1
    return shared_memory_bytes(processes, gpus=bool(machine.gpus), memory_bytes=memory)


def own_source() -> str:
    return str(Path(__file__).resolve().parents[1])
