"""`launch.on: compose`: a training whose nodes are containers of one machine, by a compose file that anybody can read and run.

The file is in the run directory (`compose.yaml`). compose makes networks, volumes and containers from it; what watches them is what
watches one container (`launch.docker_job`): the nodes beside the first get its signals and go with it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunedock.errors import DependencyError, DiskError, EngineError, TunedockError
from tunedock.image import engine
from tunedock.launch.at_work import COMPOSE_PROJECT
from tunedock.launch.compose_file import Beside, as_yaml, compose_file, services_beside
from tunedock.launch.container import container_spec
from tunedock.launch.docker import (
    DockerLauncher,
    engine_info,
    image_here,
    image_name,
    image_to_run,
    our_containers,
    recipe_of,
    refuse_elsewhere,
    run_of,
    sweep,
)
from tunedock.launch.docker_job import DockerJob
from tunedock.launch.job import JobSpec
from tunedock.launch.needs import network_of, variables
from tunedock.launch.shares import Share, refuse_too_much, shares
from tunedock.recipe.container import size_bytes
from tunedock.recipe.launch import Launch
from tunedock.recipe.schema import Recipe
from tunedock.run.placed import Placed, write_placed
from tunedock.run.record import Run, write_atomic

if TYPE_CHECKING:
    from docker import DockerClient

FILE = "compose.yaml"
SETTINGS_OF_COMPOSE = ".env"
"""Read by compose where it lies beside the file."""

SETTINGS = "compose"
"""In the run directory: the file, and the settings of what it has beside the training."""

COMMANDS = (("docker", "compose"), ("docker-compose",))
"""The plugin of today's docker, and the program before it (1.29)."""

LIMIT_S = 600.0
"""How long compose may take to make or take away what a file says; no image is built or pulled for a training."""


class ComposeLauncher(DockerLauncher):
    """Of an engine on this machine. Stages other than a training are one container each."""

    def check(self, recipe: Recipe, run: Path) -> list[str]:
        find_compose(self._environment)
        notes = super().check(_alone(recipe), run)
        endpoint = engine.find(self._environment)
        with engine.connected(endpoint) as client:
            self._shared_out(client, recipe.launch)
        return notes

    def written(self, run: Run) -> Path:
        """The compose file of a run, for who starts it by hand: a node that ends by itself is started again."""
        endpoint = engine.find(self._environment)
        refuse_elsewhere(endpoint)
        spec = JobSpec("train", run.path)
        with engine.connected(endpoint) as client:
            recipe = recipe_of(run, spec)
            return self._write(client, spec, recipe, by_hand=True)[0]

    def _submitted(self, client: DockerClient, endpoint: engine.Endpoint, spec: JobSpec) -> DockerJob:
        if spec.stage != "train" or spec.run is None:
            return super()._submitted(client, endpoint, spec)
        run = Run(spec.run)
        recipe = recipe_of(run, spec)
        launch = recipe.launch
        project = Project.of(run, endpoint, self._environment, launch.compose.profiles)
        sweep(client, run)
        _file, image, image_id = self._write(client, spec, recipe, by_hand=False)
        try:
            project.make(node_names(launch), services_beside(launch.compose.profiles))
            first, *others = project.nodes(client, launch.nodes)
            with engine.told("container engine"):
                name = str(client.api.inspect_container(first)["Name"]).lstrip("/")
            write_placed(run, Placed("train", endpoint.url, first, name, image, image_id, spec.request))
            memory = launch.container.memory
            return ComposeJob(
                spec,
                client,
                first,
                name,
                memory_bytes=None if memory is None else size_bytes(memory),
                beside=others,
                project=project,
                keeps=bool(launch.compose.profiles),
            )
        except BaseException:
            with suppress(TunedockError):
                project.take_away()
            raise

    def _shared_out(self, client: DockerClient, launch: Launch) -> list[tuple[str, ...]]:
        """The GPUs of each node. Raises RecipeError where the machine has not what all of them ask for, beside what others have."""
        info, others = engine_info(client), shares(our_containers(client))
        found: list[tuple[str, ...]] = []
        for node in range(launch.nodes):
            gpus = self._gpus(launch, others)
            refuse_too_much(launch.container, gpus, others, cpus=info["NCPU"], memory_bytes=info["MemTotal"])
            others = [*others, _share(f"node-{node}", launch, gpus)]
            found.append(gpus)
        return found

    def _write(self, client: DockerClient, spec: JobSpec, recipe: Recipe, *, by_hand: bool) -> tuple[Path, str, str]:
        """(the file, the image's name, its id). Raises as `start` does for what the machine cannot give.

        `by_hand`: for who starts it later, in a shell with variables of its own, and watches nothing.
        """
        run, launch = Run(run_of(spec)), recipe.launch
        gpus_of_nodes = self._shared_out(client, launch)
        network, _why = network_of(_alone(recipe), "train", self._environment)
        binds = self._binds(recipe, spec, network)
        names = [name for name in variables(recipe, "train", network) if by_hand or name in self._environment]
        restarts = launch.max_restarts if by_hand else 0
        image = image_name(launch, gpus_of_nodes[0])
        found = image_to_run(image_here(client, image), image, launch)
        info, bodies = engine_info(client), []
        for node, gpus in enumerate(gpus_of_nodes):
            machine = self.machine(launch, info, gpus)
            body = container_spec(spec, recipe, found, machine, network=network, binds=binds)
            part = [*body["Cmd"], "--node", str(node), "--meet", meeting_place(network, launch)]
            bodies.append({**body, "Cmd": part, "Env": [*body["Env"], *names]})
        beside = Beside(
            profiles=launch.compose.profiles,
            image=image,
            run=str(run.path),
            files=str(_settings(run.path / SETTINGS)),
            user=bodies[0]["User"],
            images=launch.compose.images,
            entrypoint=bodies[0]["Entrypoint"],
            meets=network != "host",
        )
        file = run.path / FILE
        write_atomic(file, as_yaml(compose_file(bodies, beside, restarts=restarts), str(file)))
        # Else compose takes the folder's name, and who calls it by hand has another project, or that of a run of the same name.
        write_atomic(run.path / SETTINGS_OF_COMPOSE, f"COMPOSE_PROJECT_NAME={project_name(run.path)}\n")
        return file, image, found.id


class ComposeJob(DockerJob):
    """The first node's container, watched; the others go with it."""

    def __init__(self, *arguments: Any, project: Project, keeps: bool, **named: Any) -> None:
        """`keeps`: whether what is beside the training stays when it ends, and with it what the training met on."""
        self._project = project
        self._keeps = keeps
        super().__init__(*arguments, **named)

    def close(self) -> None:
        ended, again = self.poll() is not None, self._closed
        super().close()
        if ended and not again and not self._keeps:
            with suppress(TunedockError):  # what is left of it goes with the run's next start
                self._project.take_away()


@dataclass(frozen=True, slots=True)
class Project:
    """What compose makes of a run's file, by a name of its own."""

    name: str
    file: Path
    command: tuple[str, ...]
    environment: Mapping[str, str]
    profiles: Sequence[str] = ()

    @classmethod
    def of(
        cls, run: Run, endpoint: engine.Endpoint, environment: Mapping[str, str], profiles: Sequence[str] = ()
    ) -> Project:
        """Raises DependencyError where there is no compose."""
        ours = {**environment, "DOCKER_HOST": endpoint.url}
        return cls(project_name(run.path), run.path / FILE, find_compose(ours), ours, profiles)

    def make(self, nodes: Sequence[str], beside: Sequence[str]) -> None:
        """Networks, volumes, and the nodes' containers, which are not started; what stands beside them is."""
        if beside:
            self._call("up", "--detach", "--no-build", *beside)
        self._call("up", "--no-start", "--no-build", "--force-recreate", *nodes)

    def up(self) -> None:
        """Everything, started."""
        self._call("up", "--detach", "--no-build", "--remove-orphans")

    def nodes(self, client: DockerClient, count: int) -> list[str]:
        """The ids of the nodes' containers, in order. Raises EngineError where compose has not made them."""
        filters = {"label": [f"{COMPOSE_PROJECT}={self.name}"]}
        with engine.told("container engine"):
            found = {
                each["Labels"].get("com.docker.compose.service", ""): str(each["Id"])
                for each in client.api.containers(all=True, filters=filters)
            }
        missing = [f"node-{number}" for number in range(count) if f"node-{number}" not in found]
        if missing:
            raise EngineError(f"compose has not made {missing[0]}", where=str(self.file))
        return [found[f"node-{number}"] for number in range(count)]

    def take_away(self) -> None:
        """Containers and networks; what was stored in volumes stays."""
        self._call("down", "--remove-orphans", "--timeout", "5")

    def _call(self, *arguments: str) -> None:
        # Named, they are on for what their services depend on too; compose before 2 asks for that.
        profiles = [word for profile in self.profiles for word in ("--profile", profile)]
        given = [*self.command, "--file", str(self.file), "--project-name", self.name, *profiles, *arguments]
        try:
            done = subprocess.run(  # noqa: S603 - an argument list; compose is asked for by name
                given, env=self.environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
            )
        except subprocess.TimeoutExpired:
            raise EngineError(f"compose does not come to an end of `{arguments[0]}`", where=str(self.file)) from None
        if done.returncode:
            said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
            last = said[-1].strip() if said else f"it ended with {done.returncode}"
            fetches = self.profiles and re.search(r"dial tcp|pull access|manifest|toomanyrequests|unauthorized", last)
            mirror = "`launch.compose.images` names other images, a mirror's for example" if fetches else None
            raise EngineError(f"compose: {last}", where=str(self.file), hint=mirror)


def project_name(folder: Path) -> str:
    """One for each folder that a file may be in, and people can read."""
    plain = re.sub(r"[^a-z0-9]+", "-", folder.name.lower()).strip("-")[:32]
    return f"tunedock-{plain}-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:6]}"


def find_compose(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Raises DependencyError where there is none."""
    for command in COMMANDS:
        program = shutil.which(command[0], path=environment.get("PATH"))
        if program is None:
            continue
        version = [program, *command[1:], "version"]
        with suppress(OSError, subprocess.TimeoutExpired):  # a program that does not answer is none
            answers = subprocess.run(version, env=dict(environment), capture_output=True, timeout=60, check=False)  # noqa: S603
            if answers.returncode == 0:
                return (program, *command[1:])
    raise DependencyError(
        "there is no compose here: neither `docker compose` nor `docker-compose` answers",
        where="launch.on: compose",
        hint="install Docker's compose plugin (Debian and Ubuntu: docker-compose), or use `launch.on: docker`",
    )


def _alone(recipe: Recipe) -> Recipe:
    """The recipe of one machine: nodes that are containers of it reach each other on a network of their own."""
    return recipe.model_copy(update={"launch": recipe.launch.model_copy(update={"nodes": 1})})


def node_names(launch: Launch) -> list[str]:
    return [f"node-{number}" for number in range(launch.nodes)]


def meeting_place(network: str, launch: Launch) -> str:
    """Where the nodes meet: by a service's name on a network of their own."""
    return f"{'127.0.0.1' if network == 'host' else 'node-0'}:{launch.compose.port}"


def _share(name: str, launch: Launch, gpus: tuple[str, ...]) -> Share:
    given = launch.container
    memory = 0 if given.memory is None else size_bytes(given.memory)
    return Share(f"{name} of this training", given.cpus or 0.0, memory, gpus, given.mps)


def _settings(folder: Path) -> Path:
    """The settings of what stands beside a training, as the package has them, for services of any user to read."""
    source = files("tunedock.launch").joinpath("monitoring")
    try:
        with as_file(source) as found:
            shutil.copytree(found, folder, dirs_exist_ok=True, copy_function=shutil.copyfile)
    except OSError as error:
        raise DiskError(f"cannot write: {error.strerror}", where=str(folder)) from error
    return folder
