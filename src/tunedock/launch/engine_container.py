"""`python -m tunedock.launch.engine_container ... -- PROGRAM ...`: the program of an engine in a container of somebody's image.

The gateway is in an earlier layer, and is handed this as the beginning of a command line (`recipe.serving.EngineContainer`): it
keeps the command alive as it does any program. The container has a port on this machine's loopback, a root file system that it
cannot write to, no capability, the caller's user id, and what it computes from, read-only, each at its own place. Unless weights
come from the hub it is on a network whose packages nobody outside of this machine answers.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunedock.errors import TunedockError
from tunedock.image import engine
from tunedock.launch.container import Image
from tunedock.launch.docker import image_here, refuse_elsewhere
from tunedock.launch.foreground import free_name, require_network, run
from tunedock.launch.mounts import Bind, refuse, with_links
from tunedock.launch.service_body import Service, service_body

NETWORK = "tunedock-engines"
OUTWARD = "bridge"
NETWORK_OPTIONS = {
    "com.docker.network.bridge.enable_ip_masquerade": "false",  # packages that leave carry an address nobody answers
    "com.docker.network.bridge.enable_icc": "false",  # engines do not see each other
}
STOP_S = 12


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command line says."""

    image: str
    name: str
    port: int
    program: tuple[str, ...]
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    variables: tuple[str, ...] = ()
    """Names; their values are this process's."""
    gpus: tuple[str, ...] = ()
    outward: bool = False
    """Whether it is to reach the world outside."""


def main(arguments: Sequence[str]) -> int:
    """The program's exit code."""
    asked = parse(arguments)
    try:
        endpoint = engine.find()
        refuse_elsewhere(endpoint)
        with engine.connected(endpoint) as client:
            found = image_here(client, asked.image)
            image = Image(str(found["Id"]), tuple((found.get("Config") or {}).get("Entrypoint") or ()))
            binds = binds_of(asked)
            if not asked.outward:
                require_network(client, NETWORK, NETWORK_OPTIONS)
            values = [f"{name}={os.environ[name]}" for name in asked.variables if name in os.environ]
            body = engine_body(asked, image, binds, uid=os.getuid(), gid=os.getgid())
            return run(client, {**body, "Env": [*body["Env"], *values]}, free_name("engine", asked.name))
    except TunedockError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def parse(arguments: Sequence[str]) -> Asked:
    parser = argparse.ArgumentParser(prog="tunedock.launch.engine_container", allow_abbrev=False)
    parser.add_argument("--image", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--read", action="append", default=[])
    parser.add_argument("--write", action="append", default=[])
    parser.add_argument("--env", action="append", default=[])
    parser.add_argument("--gpu", action="append", default=[])
    parser.add_argument("--outward", action="store_true")
    own, program = list(arguments), []
    if "--" in own:
        cut = own.index("--")
        own, program = own[:cut], own[cut + 1 :]
    given = parser.parse_args(own)
    return Asked(
        image=given.image,
        name=given.name,
        port=given.port,
        program=tuple(program),
        reads=tuple(given.read),
        writes=tuple(given.write),
        variables=tuple(given.env),
        gpus=tuple(given.gpu),
        outward=given.outward,
    )


def binds_of(asked: Asked) -> list[Bind]:
    """Raises RecipeError for what is never shown to a container."""
    found: list[Bind] = []
    for path in asked.reads:
        refuse(path, "--engine-image")
        found += [one for one in with_links(Bind.at_its_place(path)) if one not in found]
    return [*found, *(Bind.at_its_place(path, read_only=False) for path in asked.writes)]


def engine_body(asked: Asked, image: Image, binds: Sequence[Bind], *, uid: int, gid: int) -> dict[str, Any]:
    """For the engine's `POST /containers/create`; without the values of variables."""
    entrypoint, command = _started(image, asked.program)
    network = OUTWARD if asked.outward else NETWORK
    published = ("127.0.0.1", asked.port)
    service = Service(
        "engine", image, entrypoint, command, uid, gid, network, published, STOP_S, binds, asked.gpus
    )  # fmt: skip
    return service_body(service)


def _started(image: Image, program: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(entrypoint, command): the image's own way to its program where that is the one asked for, for it may be on no PATH."""
    own = [Path(part).name for part in image.entrypoint]
    if own and own == list(program[: len(own)]):
        return image.entrypoint, tuple(program[len(own) :])
    return (image.entrypoint if image.has_init else ()), tuple(program)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
