"""A container in the foreground: what it prints comes out here, signals go in, it is gone when this ends, and its end is ours."""

from __future__ import annotations

import os
import queue
import re
import signal
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from tunedock.errors import EngineError, TunedockError
from tunedock.image import engine
from tunedock.launch.container import LABEL
from tunedock.launch.docker_job import remove

if TYPE_CHECKING:
    from docker import DockerClient

WATCHED_BY = f"{LABEL}watched-by"
"""The process that takes the container away. One whose process has died without is taken away by the next."""

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def run(client: DockerClient, body: Mapping[str, Any], name: str) -> int:
    """Its exit code. Raises EngineError where it cannot be made or started; its name is free again at the end."""
    sweep(client)
    given = {**body, "Labels": {**body["Labels"], WATCHED_BY: str(os.getpid())}}
    orders: queue.SimpleQueue[int] = queue.SimpleQueue()
    before = {number: signal.signal(number, lambda which, _: orders.put(which)) for number in STOPS}
    container = None
    try:
        with engine.told(f"container {name}"):
            container = str(client.api.create_container_from_config(given, name)["Id"])
            client.api.start(container)
        threading.Thread(target=_print, args=(client, container), name="what it prints", daemon=True).start()
        carrier = (client, container, orders, int(body["StopTimeout"]))
        threading.Thread(target=_carry, args=carrier, name="signals", daemon=True).start()
        with engine.told(f"container {name}"):
            return int(client.api.wait(container, timeout=None)["StatusCode"])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if container is not None:
            with suppress(TunedockError):
                remove(client, container, force=True)


def _print(client: DockerClient, container: str) -> None:
    with suppress(Exception):  # the policy: an engine that breaks off is told by the wait, which ends then
        for piece in client.api.logs(container, stream=True, follow=True, stdout=True, stderr=True):
            sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()


def _carry(client: DockerClient, container: str, orders: queue.SimpleQueue[int], stop_s: int) -> None:
    """The first signal asks it to end, and kills it after `stop_s`; the second kills it.

    In threads of their own: a signal's handler may interrupt the connection to the engine anywhere.
    """
    orders.get()
    threading.Thread(target=_stop, args=(client, container, stop_s), name="stop", daemon=True).start()
    orders.get()
    with suppress(TunedockError), engine.told("container engine"):
        client.api.kill(container)


def _stop(client: DockerClient, container: str, stop_s: int) -> None:
    with suppress(TunedockError), engine.told("container engine"):
        client.api.stop(container, timeout=stop_s)


def sweep(client: DockerClient) -> None:
    """Takes away what was left by who was killed before it could."""
    with engine.told("container engine"):
        left = client.api.containers(all=True, filters={"label": WATCHED_BY})
    for each in left:
        if not _alive(each["Labels"][WATCHED_BY]):
            with suppress(TunedockError):
                remove(client, str(each["Id"]), force=True)


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def free_name(kind: str, name: str) -> str:
    """One that people can read, and no other container has."""
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.")[:40]
    return f"tunedock-{kind}-{plain or 'model'}-{os.urandom(3).hex()}"


def require_network(client: DockerClient, name: str, options: Mapping[str, str]) -> None:
    """Makes a network of the engine where it is not there yet."""
    from docker.errors import APIError

    with engine.told("container engine"):
        if any(each["Name"] == name for each in client.api.networks([name])):
            return
        try:
            client.api.create_network(name, driver="bridge", options=dict(options), check_duplicate=True)
        except APIError as error:
            if "already exists" not in engine.said(error):
                raise EngineError(engine.said(error), where=f"network {name}") from error
