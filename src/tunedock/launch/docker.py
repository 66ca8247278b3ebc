"""Stages in containers of this machine's engine: what the recipe asks is put together, held against the machine, and submitted.

Nothing is pulled: an image that is not here is an error that says how to get it, and not gigabytes that nobody asked for.
"""

from __future__ import annotations

import getpass
import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunedock import __version__
from tunedock.errors import DependencyError, EngineError, RecipeError, RunError, TunedockError
from tunedock.image import engine
from tunedock.image.reference import parse
from tunedock.launch.container import (
    INFINIBAND,
    LABEL,
    MPS_PIPES,
    Image,
    Machine,
    container_name,
    container_spec,
    node_of,
    own_source,
    with_variables,
)
from tunedock.launch.docker_job import DockerJob, remove
from tunedock.launch.exported import ExportAside
from tunedock.launch.job import Job, JobSpec
from tunedock.launch.local import LocalLauncher
from tunedock.launch.mounts import Bind, Caches, binds_of
from tunedock.launch.needs import network_of, variables
from tunedock.launch.shares import Share, choose_gpus, refuse_too_much, shares
from tunedock.plan.machine.cards import find
from tunedock.plan.machine.containers import TOOLKIT
from tunedock.recipe.container import size_bytes
from tunedock.recipe.launch import Launch
from tunedock.recipe.schema import Recipe
from tunedock.run.placed import Placed, write_placed
from tunedock.run.record import Run

if TYPE_CHECKING:
    from docker import DockerClient

DEFAULT_IMAGES = {True: "tunedock-train:cuda", False: "tunedock-train:cpu"}
"""Whether a run gets GPUs -> the image that `tunedock image build` makes for it."""

VERSION_LABEL = "org.opencontainers.image.version"

TARGET_LABEL = "io.tunedock.target"
"""Only our own images have it: another's version is not ours."""

TRIES = 3
"""How often another GPU is looked for, where one was taken by a run that was started at the same time."""


class DockerLauncher:
    """Of an engine on this machine. Stages without a run stay outside."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self._environment = dict(os.environ if environment is None else environment)

    def start(self, spec: JobSpec) -> Job:
        """Raises RecipeError for what the machine cannot give, EngineError for an engine or an image that is not there."""
        if spec.run is None:
            return LocalLauncher().start(spec)
        endpoint = engine.find(self._environment)
        refuse_elsewhere(endpoint)
        client = engine.connect(endpoint)
        try:
            return self._submitted(client, endpoint, spec)
        except BaseException:
            client.close()
            raise

    def check(self, recipe: Recipe, run: Path) -> list[str]:
        """Raises what `start` would, for a training that has no run yet. Returns what is worth saying about it."""
        endpoint = engine.find(self._environment)
        refuse_elsewhere(endpoint)
        with engine.connected(endpoint) as client:
            others = shares(our_containers(client))
            gpus = self._gpus(recipe.launch, others)
            name = image_name(recipe.launch, gpus)
            image = image_to_run(image_here(client, name), name, recipe.launch)
            info = engine_info(client)
            refuse_too_much(recipe.launch.container, gpus, others, cpus=info["NCPU"], memory_bytes=info["MemTotal"])
            self.machine(recipe.launch, info, gpus)
            network, why = network_of(recipe, "train", self._environment)
            _refuse_unknown_network(client, network)
            self._binds(recipe, JobSpec("train", run), network, make=False)
        notes = [f"in a container of {name} ({image.id.removeprefix('sha256:')[:12]})"]
        return [*notes, *([f"with the {network} network: {why}"] if why is not None else [])]

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _submitted(self, client: DockerClient, endpoint: engine.Endpoint, spec: JobSpec) -> DockerJob:
        run = Run(run_of(spec))
        recipe = recipe_of(run, spec)
        sweep(client, run, node_of(spec))
        named = image_name(recipe.launch, self._gpus(recipe.launch, shares(our_containers(client))))
        image = image_to_run(image_here(client, named), named, recipe.launch)
        network, _why = network_of(recipe, spec.stage, self._environment)
        aside = ExportAside(Path(str(spec.request["to"]))) if spec.stage == "export" else None
        spec = spec if aside is None else aside.spec(spec)
        name = container_name(spec)
        container = None
        try:
            container = self._created(client, spec, recipe, image, name, network)
            placed = Placed(spec.stage, endpoint.url, container, name, named, image.id, spec.request)
            write_placed(run, placed, node=node_of(spec))
            memory = recipe.launch.container.memory
            job = DockerJob(
                spec,
                client,
                container,
                name,
                memory_bytes=None if memory is None else size_bytes(memory),
                aside=aside,
            )
        except BaseException as error:
            if aside is not None:
                aside.close()
            if container is not None:
                with suppress(TunedockError):
                    remove(client, container, force=True)
            if isinstance(error, EngineError) and "could not select device driver" in error.message:
                raise without_toolkit(error) from None
            raise
        return job

    def _created(
        self, client: DockerClient, spec: JobSpec, recipe: Recipe, image: Image, name: str, network: str
    ) -> str:
        """The id of a container that has been made, and fits beside those that were made before it."""
        info, binds = engine_info(client), self._binds(recipe, spec, network)
        for attempt in range(TRIES):
            gpus = self._gpus(recipe.launch, shares(our_containers(client)))
            machine = self.machine(recipe.launch, info, gpus)
            body = container_spec(spec, recipe, image, machine, network=network, binds=binds)
            names = variables(recipe, spec.stage, network)
            given = {name: self._environment[name] for name in names if name in self._environment}
            with engine.told(f"container {name}"):
                container = str(client.api.create_container_from_config(with_variables(body, given), name)["Id"])
            others = shares(our_containers(client), before=container)
            try:
                refuse_too_much(recipe.launch.container, gpus, others, cpus=info["NCPU"], memory_bytes=info["MemTotal"])
                return container
            except BaseException:
                remove(client, container, force=True)
                if attempt == TRIES - 1 or not isinstance(recipe.launch.container.gpus, int):
                    raise
        raise AssertionError("the last try returns or raises")

    def machine(self, launch: Launch, info: Mapping[str, Any], gpus: tuple[str, ...]) -> Machine:
        """What of this machine and of the caller matters. Raises RecipeError for what the recipe asks and it has not."""
        security = [str(each) for each in info.get("SecurityOptions") or ()]
        given = launch.container
        if given.runtime is not None and given.runtime not in (info.get("Runtimes") or {}):
            known = ", ".join(sorted(info.get("Runtimes") or {}))
            raise RecipeError(
                f"the engine knows no runtime `{given.runtime}`: it has {known}",
                where="launch.container.runtime",
                hint="name it in /etc/docker/daemon.json under `runtimes`, and restart the engine",
            )
        infiniband = Path(INFINIBAND).is_dir()
        if given.infiniband == "on" and not infiniband:
            raise RecipeError(
                f"this machine has no {INFINIBAND}",
                where="launch.container.infiniband",
                hint="load its drivers, or leave it out",
            )
        if given.mps is not None and not Path(MPS_PIPES).is_dir():
            raise RecipeError(
                f"NVIDIA's MPS daemon does not run here: there is no {MPS_PIPES}",
                where="launch.container.mps",
                hint="start it: `nvidia-cuda-mps-control -d`",
            )
        return Machine(
            uid=os.getuid(),
            gid=os.getgid(),
            groups=tuple(group for group in os.getgroups() if group != os.getgid()),
            user=_user_name(),
            caches=self._caches(),
            hostname=socket.gethostname(),
            source=own_source(),
            gpus=gpus,
            infiniband=infiniband,
            rootless=any("rootless" in each for each in security),
            remapped=any("name=userns" in each for each in security),
            environment=self._environment,
        )

    def _gpus(self, launch: Launch, others: list[Share]) -> tuple[str, ...]:
        asks = launch.container.gpus
        cards = [] if asks == "none" else [str(index) for index, _ in enumerate(find().of("NVIDIA"))]
        return choose_gpus(
            launch.container,
            cards,
            others,
            visible=self._environment.get("CUDA_VISIBLE_DEVICES"),
            processes=launch.processes,
        )

    def _binds(self, recipe: Recipe, spec: JobSpec, network: str, *, make: bool = True) -> list[Bind]:
        to = spec.request.get("to") if spec.stage == "export" else None
        return binds_of(
            recipe,
            spec.stage,
            run_of(spec),
            caches=self._caches(),
            environment=self._environment,
            network=network,
            request=spec.request,
            writable=[Path(to).parent] if to else [],
            make=make,
        )

    def _caches(self) -> Caches:
        return Caches.of(self._environment, self._environment.get("HOME") or str(Path.home()))


def image_name(launch: Launch, gpus: Sequence[str]) -> str:
    """The image a run is in."""
    return launch.image or DEFAULT_IMAGES[bool(gpus)]


def _refuse_unknown_network(client: DockerClient, name: str) -> None:
    """Raises RecipeError where the engine has no network of that name."""
    if name in ("none", "bridge", "host"):
        return
    with engine.told("container engine"):
        known = sorted(str(each["Name"]) for each in client.api.networks())
    if name not in known:
        raise RecipeError(
            f"the engine has no network `{name}`: it has {', '.join(known)}",
            where="launch.container.network",
            hint=f"make it: `docker network create {name}`",
        )


def image_here(client: DockerClient, name: str) -> Mapping[str, Any]:
    """What the engine says of an image. Raises EngineError where it has none by that name, RecipeError for what is no name."""
    from docker.errors import ImageNotFound

    parse(name)  # the engine's address is made of it
    try:
        with engine.told(f"image {name}"):
            found: Mapping[str, Any] = client.api.inspect_image(name)
            return found
    except EngineError as error:
        if isinstance(error.__cause__, ImageNotFound):
            raise EngineError(
                f"the engine has no image `{name}`",
                where="launch.image",
                hint=f"make it with `tunedock image build`, or fetch it: `docker pull {name}`",
            ) from None
        raise


def image_to_run(found: Mapping[str, Any], name: str, launch: Launch) -> Image:
    """What a container needs to know of an image. Raises EngineError for one of another version: it would not understand us."""
    config = found.get("Config") or {}
    version = (config.get("Labels") or {}).get(VERSION_LABEL)
    if version not in (None, __version__) and TARGET_LABEL in config["Labels"] and not launch.container.source:
        raise EngineError(
            f"the image `{name}` has tunedock {version}, and this is {__version__}",
            where="launch.image",
            hint="make it again with `tunedock image build`, or install that version here",
        )
    return Image(found["Id"], tuple(config.get("Entrypoint") or ()))


def refuse_elsewhere(endpoint: engine.Endpoint) -> None:
    """A run's files are mounted, so its engine is to be where they are. Raises EngineError."""
    if endpoint.socket is None:
        raise EngineError(
            f"the container engine at {endpoint.url} ({endpoint.found_by}) is on another machine, which has not this one's files",
            where="launch.on: docker",
            hint="call tunedock there, or choose this machine's engine: `docker context use default`, no DOCKER_HOST",
        )


def without_toolkit(error: TunedockError) -> DependencyError:
    return DependencyError(
        f"the engine has nothing that gives GPUs to a container ({error.message})",
        where="launch.container.gpus",
        hint=TOOLKIT,
    )


def run_of(spec: JobSpec) -> Path:
    if spec.run is None:
        raise RunError(f"`{spec.stage}` needs a run")
    return spec.run


def recipe_of(run: Run, spec: JobSpec) -> Recipe:
    try:
        recipe = Recipe.model_validate(run.resolved()["recipe"])
    except (KeyError, ValueError) as error:
        raise RunError(f"its recipe cannot be read: {str(error).splitlines()[0]}", where=str(run.path)) from None
    return recipe if spec.launch is None else recipe.model_copy(update={"launch": spec.launch})


def engine_info(client: DockerClient) -> Mapping[str, Any]:
    with engine.told("container engine"):
        found: Mapping[str, Any] = client.api.info()
        return found


def our_containers(client: DockerClient) -> list[Mapping[str, Any]]:
    """As the engine lists them, with the moment each was made to the microsecond: of two made in one second one was first."""
    from docker.errors import NotFound

    found: list[Mapping[str, Any]] = []
    with engine.told("container engine"):
        for each in client.api.containers(all=True, filters={"label": f"{LABEL}version"}):
            with suppress(NotFound):  # it has gone since
                made = str(client.api.inspect_container(each["Id"])["Created"])
                found.append({**each, "Created": datetime.fromisoformat(made[:26].rstrip("Z") + "+00:00").timestamp()})
    return found


def sweep(client: DockerClient, run: Run, node: int = 0) -> None:
    """Takes away what earlier stages of this run (of this node of it) left, whose watcher had ended before them."""
    for each in our_containers(client):
        labels = each.get("Labels") or {}
        ours = labels.get(f"{LABEL}run") == str(run.path) and labels.get(f"{LABEL}node", "0") == str(node)
        if ours and each.get("State") in ("exited", "dead", "created"):
            remove(client, str(each["Id"]))


def _user_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # an id without a name
        return str(os.getuid())
