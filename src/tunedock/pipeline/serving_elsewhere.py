"""A gateway in a container of this machine's engine: in the foreground, or as a service of a compose file."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tunedock.errors import DiskError, RecipeError
from tunedock.image import engine
from tunedock.image.targets import target
from tunedock.launch.compose import SETTINGS_OF_COMPOSE, Project, find_compose, project_name
from tunedock.launch.compose_file import yaml_text
from tunedock.launch.container import Image
from tunedock.launch.docker import image_here, refuse_elsewhere
from tunedock.launch.foreground import free_name, run
from tunedock.launch.gateway import Caller, binds_of, gateway_body, inside, refuse_inside, variables_of
from tunedock.launch.gateway_file import KEY, STORE, Beside, gateway_file
from tunedock.launch.mounts import Caches
from tunedock.launch.scraping import Address, Scraped, write
from tunedock.pipeline.serving import visible_gpus
from tunedock.pipeline.serving_words import words_of
from tunedock.recipe.serving import ServeOrder

if TYPE_CHECKING:
    from docker import DockerClient

Tell = Callable[[str], None]

FILE = "compose.yaml"
AUDIT = "audit/access.jsonl"
HEADER = """\
# Written by tunedock; `tunedock serve --on compose` writes it anew. To use it by itself, in this folder:
#   docker-compose up -d                          the gateway
#   docker-compose --profile monitoring up -d     and what watches it, where that was asked for
#   docker-compose down                           it answers what is at work, and ends
"""


def serve_in_container(order: ServeOrder, image: str | None, tell: Tell) -> int:
    """Until it ends or is asked to; its exit code. Raises as `tunedock.launch.docker` does for what is not here."""
    refuse_inside(order)
    caller, endpoint = _caller(), engine.find()
    refuse_elsewhere(endpoint)
    with engine.connected(endpoint) as client:
        name = image or default_image(order)
        found, binds = _image(client, name), binds_of(order, caller)
        body = gateway_body(order, words_of(inside(order)), found, binds, caller, _gpus(order))
        names = variables_of(order)
        missing = [each for each in names if each not in os.environ]
        if missing:
            raise RecipeError(f"the variable {missing[0]} is not set", where="serve", hint="it holds a key")
        body = {**body, "Env": [*body["Env"], *(f"{each}={os.environ[each]}" for each in names)]}
        tell(f"in a container of {name}, to be reached at {_url(order)}/v1")
        return run(client, body, free_name("serve", order.backends[0].name))


def write_compose(
    order: ServeOrder,
    image: str | None,
    folder: Path,
    profiles: Collection[str],
    images: Mapping[str, str] | None = None,
) -> Path:
    """The file, with the secrets and the settings it names. Secrets that are there stay as they are."""
    folder = folder.expanduser().absolute()
    if "postgresql" in profiles:
        if order.store is not None:
            raise RecipeError("two stores are named", where="--store, --profile postgresql", hint="leave one out")
        audit = order.audit or str(folder / AUDIT)  # a store on a server has no folder for its own
        order = order.model_copy(update={"store": STORE, "audit": audit})
    refuse_inside(order)
    caller, endpoint = _caller(), engine.find()
    refuse_elsewhere(endpoint)
    with engine.connected(endpoint) as client:
        name = image or default_image(order)
        body = gateway_body(
            order, words_of(inside(order)), _image(client, name), binds_of(order, caller), caller, _gpus(order)
        )
    beside = Beside(str(folder), profiles, variables_of(order), images or {})
    document = gateway_file(body, beside, image=name, tls=order.tls_cert is not None)
    try:
        _write_secrets(folder / "secrets", profiles)
        if "monitoring" in profiles:
            address = Address(f"gateway:{order.port}", order.tls_cert is not None)
            write(folder / "monitoring", Scraped(gateways=[address], key_file=KEY, ca_file=None), over=True)
        (folder / FILE).write_text(HEADER + yaml_text(document), encoding="utf-8")
        (folder / SETTINGS_OF_COMPOSE).write_text(f"COMPOSE_PROJECT_NAME={project_name(folder)}\n", encoding="utf-8")
    except OSError as error:
        raise DiskError(f"cannot write: {error.strerror}", where=str(folder)) from error
    return folder / FILE


def up(file: Path, profiles: Collection[str]) -> None:
    """Starts what the file says, and does not wait. Raises EngineError in compose's words."""
    endpoint = engine.find()
    ours = {**os.environ, "DOCKER_HOST": endpoint.url}
    optional = [profile for profile in profiles if profile == "monitoring"]
    project = Project(project_name(file.parent), file, find_compose(ours), ours, optional)
    project.up()


def _write_secrets(folder: Path, profiles: Collection[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    if "postgresql" in profiles and not (folder / "pgpass").exists():
        password = secrets.token_urlsafe(32)
        _private(folder / "postgres-password", password)
        _private(folder / "pgpass", f"postgres:5432:*:tunedock:{password}\n")
    if "monitoring" in profiles and not (folder / "prometheus-key").exists():
        # Prometheus is another user in its container; outside, the folder is closed.
        (folder / "prometheus-key").write_text("")
        (folder / "prometheus-key").chmod(0o644)


def _private(path: Path, content: str) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        file.write(content)


def _caller() -> Caller:
    home = os.environ.get("HOME") or str(Path.home())
    return Caller(os.getuid(), os.getgid(), Caches.of(os.environ, home), dict(os.environ))


def default_image(order: ServeOrder) -> str:
    """What `tunedock image build --role serve` makes for such models on this machine."""
    program = next((backend.start.program for backend in order.backends if backend.start is not None), None)
    if program in ("vllm", "sglang"):
        return target("cuda", "serve", program).default_tag
    if {backend.kind for backend in order.backends} == {"gguf"}:
        return target("edge", "serve").default_tag
    return target("cuda" if visible_gpus() else "cpu", "serve").default_tag


def _gpus(order: ServeOrder) -> tuple[str, ...]:
    """None for what only hands on."""
    computes = any(backend.kind in ("run", "folder", "gguf") for backend in order.backends)
    return tuple(visible_gpus()) if computes else ()


def _image(client: DockerClient, name: str) -> Image:
    found = image_here(client, name)
    return Image(str(found["Id"]), tuple((found.get("Config") or {}).get("Entrypoint") or ()))


def _url(order: ServeOrder) -> str:
    host = f"[{order.host}]" if ":" in order.host else order.host
    return f"{'https' if order.tls_cert else 'http'}://{host}:{order.port}"
