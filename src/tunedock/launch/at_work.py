"""Who is at work in a run, wherever: asked before a stage is started, shown, and stopped.

A worker holds the run's lock, which is seen through a mount. Not through every sandbox: gVisor and Kata keep locks to themselves,
so the container's own engine is asked as well.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunedock.errors import DependencyError, EngineError, RunError
from tunedock.image import engine
from tunedock.launch.container import LABEL
from tunedock.launch.docker_job import remove
from tunedock.recipe.launch import Launch
from tunedock.run.placed import Placed, all_placed
from tunedock.run.pulse import beats_of
from tunedock.run.record import Run

if TYPE_CHECKING:
    from docker import DockerClient

ENGINE_S = 10.0
"""How long a run's engine may take to say what a container does."""

LOOK_EVERY_S = 0.2

COMPOSE_PROJECT = "com.docker.compose.project"
"""The label by which compose knows what is its own."""

MARGIN_S = 15.0
"""Beyond `launch.grace_s`: the row in progress, and what ends after the worker."""


def container_at_work(run: Run) -> Placed | None:
    """The container a stage of this run is in now; None where it is in none, or its engine does not answer or is another
    machine's."""
    for placed in all_placed(run):
        if placed.host != socket.gethostname():
            continue
        with suppress(EngineError, DependencyError), _engine_of(placed) as client:
            state = _state(client, placed)
            if state is not None and (state.get("Running") or state.get("Restarting")):
                return placed
    return None


def refuse_at_work(run: Run) -> None:
    """Raises RunError where a stage is at work in the run."""
    placed = container_at_work(run)
    if placed is not None:
        raise RunError(
            f"a stage is at work in this run, in the container {placed.name}",
            where=str(run.path),
            hint=f"wait for it, or stop it: `tunedock runs stop {run.path}`",
        )
    if run.locked():
        raise RunError(
            "a process is at work in this run",
            where=str(run.path),
            hint=f"wait for it, or stop it with Ctrl-C, or by `tunedock runs stop {run.path}`",
        )


def stop(run: Run, *, now: bool = False) -> str:
    """Asks what is at work in a run to end, as Ctrl-C does: a training saves a checkpoint. Waits for its end, and says who ended.

    `now`: ends it at once. Raises RunError where nothing is at work, or it does not end within `launch.grace_s` and some seconds.
    """
    number = signal.SIGKILL if now else signal.SIGINT
    limit_s = _launch_of(run).grace_s + MARGIN_S
    placed = container_at_work(run)
    if placed is not None:
        _stop_container(run, placed, number, limit_s)
        return f"container {placed.name}"
    if not run.locked():
        raise RunError("nothing is at work in this run", where=str(run.path))
    pids = list(_workers_here(run))
    if not pids:
        raise RunError(
            "what is at work in this run is on another machine, or another user's",
            where=str(run.path),
            hint="call `tunedock runs stop` there",
        )
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
    deadline = time.monotonic() + limit_s
    while run.locked():
        _still_waiting(run, deadline, limit_s)
    return f"process {', '.join(map(str, pids))}"


def _stop_container(run: Run, placed: Placed, number: int, limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    with _engine_of(placed) as client:
        nodes = [each for each in _containers_of(client, run) if each != placed.container]
        networks = _networks_of(client, placed)
        for container in (*nodes, placed.container):
            with engine.told(f"container {placed.name}"), suppress(_not_found()):
                client.api.kill(container, int(number))
        while (state := _state(client, placed)) is not None and state.get("Running"):
            _still_waiting(run, deadline, limit_s)
        # Who started it takes it away, if they still watch.
        time.sleep(2 * LOOK_EVERY_S)
        for container in (*nodes, placed.container):
            remove(client, container, force=container in nodes)
        for network in networks:
            with suppress(_api_error()):  # what stands beside a training may still be on it
                client.api.remove_network(network)


def _containers_of(client: DockerClient, run: Run) -> list[str]:
    """The ids of those a run is in now: of a training by compose, one for each node."""
    with engine.told("container engine"):
        found = client.api.containers(filters={"label": f"{LABEL}run={run.path}"})
        return [str(each["Id"]) for each in found]


def _networks_of(client: DockerClient, placed: Placed) -> list[str]:
    """The ids of those that compose made for the training; none where it was not compose."""
    with engine.told("container engine"):
        try:
            labels = client.api.inspect_container(placed.container)["Config"].get("Labels") or {}
        except _not_found():
            return []
        project = labels.get(COMPOSE_PROJECT)
        found = client.api.networks(filters={"label": f"{COMPOSE_PROJECT}={project}"}) if project else []
        return [str(each["Id"]) for each in found]


def _still_waiting(run: Run, deadline: float, limit_s: float) -> None:
    if time.monotonic() >= deadline:
        raise RunError(
            f"it is still at work, {limit_s:.0f} s after it was asked to stop",
            where=str(run.path),
            hint=f"`tunedock runs stop --now {run.path}` ends it at once; it then goes on from its last checkpoint",
        )
    time.sleep(LOOK_EVERY_S)


def _workers_here(run: Run) -> Iterator[int]:
    """Processes of this machine that are the run's workers: by their pulses, and by the run's record where there are none."""
    told = [beat.pid for beat in beats_of(run.ranks) if beat.host == socket.gethostname()]
    recorded = run.state().pid
    for pid in dict.fromkeys([*told, *([] if recorded is None else [recorded])]):
        if _is_worker(pid, run):
            yield pid


def _is_worker(pid: int, run: Run) -> bool:
    """Whether a process is what the record takes it for: its number may have gone to another one since."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(b"tunedock" in word for word in words) and os.fsencode(run.path) in words


@contextmanager
def _engine_of(placed: Placed) -> Iterator[DockerClient]:
    with engine.connected(engine.Endpoint(placed.engine, "the run's container.json"), ENGINE_S) as client:
        yield client


def _state(client: DockerClient, placed: Placed) -> dict[str, Any] | None:
    """None where the container is gone."""
    with engine.told(f"container {placed.name}"):
        try:
            state: dict[str, Any] = client.api.inspect_container(placed.container)["State"]
            return state
        except _not_found():
            return None


def _api_error() -> type[Exception]:
    from docker.errors import APIError

    found: type[Exception] = APIError
    return found


def _not_found() -> type[Exception]:
    from docker.errors import NotFound

    found: type[Exception] = NotFound
    return found


def _launch_of(run: Run) -> Launch:
    with suppress(KeyError, ValueError):
        return Launch.model_validate(run.resolved()["recipe"]["launch"])
    return Launch()
