"""A gateway in a container: what it is shown of this machine, which network it gets, and the body the engine is sent."""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tunedock.errors import RecipeError
from tunedock.launch.container import Image
from tunedock.launch.mounts import Bind, Caches, refuse, with_links
from tunedock.launch.needs import PLAIN
from tunedock.launch.service_body import Service, service_body
from tunedock.recipe.resolve import paths_of
from tunedock.recipe.schema import Recipe
from tunedock.recipe.serving import REMOTE, Backend, ServeOrder
from tunedock.run.record import Run

GRACE_MARGIN_S = 15
"""Over the gateway's own: what is at work is answered, then programs are ended and logs closed."""

EVERYWHERE = "0.0.0.0"  # noqa: S104 - of the container; what is published of it is said beside
BRIDGE = "bridge"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who starts it."""

    uid: int
    gid: int
    caches: Caches
    environment: Mapping[str, str]


def refuse_inside(order: ServeOrder) -> None:
    """Raises RecipeError for what a container cannot serve."""
    if order.open:
        raise RecipeError(
            "anybody could call: a container is reached from outside of it",
            where="--open",
            hint="issue a key: `tunedock token issue NAME --store DIR/access.db`, and give the same --store here",
        )
    if order.port == 0:
        raise RecipeError("a port that is published has a number", where="--port", hint="name one")
    for backend in order.backends:
        if backend.kind == "version":
            raise RecipeError(
                "what a registry names changes, and a container sees what it was shown as it began",
                where=backend.place,
                hint="name the run or the folder",
            )
        if backend.start is not None and backend.start.container is not None:
            raise RecipeError(
                "a gateway in a container starts no other container: that would need the engine's socket, which has the machine",
                where="--engine-image",
                hint="use an image that holds it (`tunedock image build cuda --role serve --engine vllm`), or name an address",
            )
        if backend.kind in REMOTE and _is_here(backend.place):
            raise RecipeError(
                f"{backend.place} is in the container the container itself",
                where="serve",
                hint="name the server as other machines reach it",
            )


def variables_of(order: ServeOrder) -> tuple[str, ...]:
    """Names of those that hold secrets."""
    found = [backend.key_env for backend in order.backends if backend.key_env]
    if order.jwt is not None and order.jwt.secret_env:
        found.append(order.jwt.secret_env)
    return tuple(dict.fromkeys(found))


def binds_of(order: ServeOrder, caller: Caller) -> list[Bind]:
    """Models and secrets read-only, folders of the store and of logs writable, each at its own place. Raises RecipeError."""
    found: list[Bind] = []
    for key, bind in [*_read(order, caller), *_written(order)]:
        refuse(bind.source, key)
        found += [one for one in (with_links(bind) if bind.read_only else [bind]) if one not in found]
    places = {bind.target: bind for bind in sorted(found, key=lambda each: not each.read_only)}
    return [places[target] for target in sorted(places)]


def environment_of(order: ServeOrder, caller: Caller) -> dict[str, str]:
    """What holds no secret."""
    found = {name: value for name, value in caller.environment.items() if PLAIN.fullmatch(name)}
    if any(_hub_id(backend) for backend in order.backends):
        found |= {"HF_HUB_CACHE": str(caller.caches.hub), "HF_HUB_OFFLINE": "1"}
    passwords = caller.environment.get("PGPASSFILE")
    return found | ({"PGPASSFILE": passwords} if passwords and _of_postgresql(order) else {})


def gateway_body(
    order: ServeOrder, words: Sequence[str], image: Image, binds: Sequence[Bind], caller: Caller, gpus: tuple[str, ...]
) -> dict[str, Any]:
    """`words`: of `tunedock serve` for the order inside (`pipeline.serving_words`)."""
    entrypoint = image.entrypoint if image.has_init else ()
    return service_body(
        Service(
            stage="serve",
            image=image,
            entrypoint=entrypoint,
            command=("tunedock", "serve", *words),
            uid=caller.uid,
            gid=caller.gid,
            network=BRIDGE,
            published=(order.host, order.port),
            stop_s=math.ceil(order.grace_s) + GRACE_MARGIN_S,
            binds=binds,
            gpus=gpus,
            environment=environment_of(order, caller),
        )
    )


def inside(order: ServeOrder) -> ServeOrder:
    """The same where it listens to what the engine hands on."""
    return order.model_copy(update={"host": EVERYWHERE})


# -- what it is shown --------------------------------------------------------------------------------------------------


def _read(order: ServeOrder, caller: Caller) -> Iterator[tuple[str, Bind]]:
    for backend in order.backends:
        if backend.kind in REMOTE:
            continue
        place = Path(backend.place)
        yield "serve", Bind.at_its_place(place if place.is_dir() else place.parent)
        for path in backend.adapters.values():
            yield "--adapter", Bind.at_its_place(path)
        if backend.kind == "run":
            for path in _of_run(backend, caller):
                yield "model.path", Bind.at_its_place(path)
    jwt = order.jwt
    for flag, file in (
        ("--tls-cert", order.tls_cert),
        ("--tls-key", order.tls_key),
        ("--jwt-secret-file", jwt and jwt.secret_file),
        ("--jwks", jwt and jwt.jwks if jwt and jwt.jwks and "://" not in jwt.jwks else None),
        ("PGPASSFILE", environment_of(order, caller).get("PGPASSFILE")),
    ):
        if file:
            yield flag, Bind.at_its_place(file)


def _of_run(backend: Backend, caller: Caller) -> Iterator[str]:
    """What the run's base is made of."""
    run = Run.open(Path(backend.place))
    recipe = Recipe.model_validate(run.resolved()["recipe"])
    for key, path, read in paths_of(recipe):
        if key.startswith("model.") and read and path.startswith("/") and Path(path).exists():
            yield path
    if _hub_id(backend):
        yield str(caller.caches.hub)


def _hub_id(backend: Backend) -> bool:
    if backend.kind != "run":
        return False
    recipe = Recipe.model_validate(Run.open(Path(backend.place)).resolved()["recipe"])
    return not recipe.model.path.startswith("/")


def _written(order: ServeOrder) -> Iterator[tuple[str, Bind]]:
    """Folders, for a database has files beside it, and a log becomes another."""
    if order.store is None:
        raise RecipeError(
            "keys are kept where a container can write",
            where="--store",
            hint="name a file in a folder of its own (--store keys/access.db), or postgresql://",
        )
    for flag, path in (("--store", order.store), ("--access-log", order.access_log), ("--audit", order.audit)):
        if path is not None and "://" not in path:
            folder = Path(path).absolute().parent
            folder.mkdir(parents=True, exist_ok=True)
            yield flag, Bind.at_its_place(folder, read_only=False)


def _of_postgresql(order: ServeOrder) -> bool:
    return order.store is not None and order.store.startswith("postgresql")


def _is_here(address: str) -> bool:
    host = urlsplit(address).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
