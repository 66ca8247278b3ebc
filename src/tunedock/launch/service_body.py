"""A container that serves, as the engine is sent it (`POST /containers/create`): no rights, a root it cannot write to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tunedock import __version__
from tunedock.launch.container import LABEL, LOG, Image, gpu_requests
from tunedock.launch.mounts import Bind
from tunedock.plan.shared_memory import shared_memory_bytes

HOME = "/home/tunedock"


@dataclass(frozen=True, slots=True)
class Service:
    """What differs between such containers."""

    stage: str
    image: Image
    entrypoint: tuple[str, ...]
    command: tuple[str, ...]
    uid: int
    gid: int
    network: str
    published: tuple[str, int]
    """Of this machine: an address and a port, which the container listens at too."""
    stop_s: int
    binds: Sequence[Bind] = ()
    gpus: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    """No secrets: their values are added when it is submitted."""


def service_body(service: Service) -> dict[str, Any]:
    labels = {"stage": service.stage, "version": __version__, "user": str(service.uid)}
    if service.gpus:
        labels["gpus"] = ",".join(service.gpus)
    address, number = service.published
    port = f"{number}/tcp"
    plain = {"HOME": HOME, "USER": "tunedock", "LOGNAME": "tunedock", "PYTHONDONTWRITEBYTECODE": "1"}
    return {
        "Image": service.image.id,
        "Entrypoint": list(service.entrypoint),
        "Cmd": list(service.command),
        "User": f"{service.uid}:{service.gid}",
        "WorkingDir": HOME,
        "Env": [f"{name}={value}" for name, value in sorted({**plain, **service.environment}.items())],
        "Labels": {f"{LABEL}{name}": value for name, value in labels.items()},
        "StopTimeout": service.stop_s,
        "ExposedPorts": {port: {}},
        "Healthcheck": {"Test": ["NONE"]},
        "HostConfig": {
            "Init": not service.image.has_init,
            "ReadonlyRootfs": True,
            "NetworkMode": service.network,
            "PortBindings": {port: [{"HostIp": address, "HostPort": str(number)}]},
            "IpcMode": "private",
            "ShmSize": shared_memory_bytes(len(service.gpus) or 1, gpus=bool(service.gpus), memory_bytes=None),
            "Tmpfs": dict.fromkeys(("/tmp", HOME), "rw,exec,nosuid,nodev,mode=1777"),  # noqa: S108 - in the container
            "Mounts": [bind.mount() for bind in service.binds],
            "CapDrop": ["ALL"],
            "SecurityOpt": ["no-new-privileges"],
            "DeviceRequests": gpu_requests(service.gpus),
            "LogConfig": LOG,
        },
    }
