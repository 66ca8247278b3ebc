"""The container engine: found, spoken to through Docker's SDK, its errors turned into ours.

Docker and Podman both answer Docker's API. Which one is asked: `DOCKER_HOST`, then the context `docker context use` has chosen,
then the sockets that engines leave where they stand. The SDK is imported when an engine is asked, not before: it takes as long as
the rest of a command.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tunedock.errors import DependencyError, DiskError, EngineError, TunedockError
from tunedock.plan.machine.symptoms import known_way_out

if TYPE_CHECKING:
    from docker import DockerClient

ANSWER_S = 60.0
"""Seconds an engine gets for an answer; what takes longer (a wait, a build, logs) names a limit of its own."""

INSTALL = "install Docker (https://docs.docker.com/engine/install) or Podman, or point DOCKER_HOST to an engine"
PACKAGE = "pip install 'tunedock[containers]'"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where an engine listens (`unix:///var/run/docker.sock`, `tcp://host:2376`), and what said so."""

    url: str
    found_by: str
    tls: Path | None = None
    """A folder with `ca.pem`, `cert.pem` and `key.pem`, where the engine wants to know who asks."""

    @property
    def socket(self) -> Path | None:
        return Path(self.url.removeprefix("unix://")) if self.url.startswith("unix://") else None


def find(environment: Mapping[str, str] = os.environ) -> Endpoint:
    """The engine to use, not asked yet. Raises EngineError where none is named and none stands."""
    if host := environment.get("DOCKER_HOST"):
        secured = bool(environment.get("DOCKER_TLS_VERIFY"))
        folder = Path(environment.get("DOCKER_CERT_PATH") or _config(environment)) if secured else None
        return Endpoint(host, "DOCKER_HOST", folder)
    if endpoint := _context(environment):
        return endpoint
    places = sockets(environment)
    for path in places:
        if path.is_socket():
            return Endpoint(f"unix://{path}", f"the socket {path}")
    looked = ", ".join(str(path) for path in places)
    raise EngineError(f"no container engine was found (looked for {looked})", where="container engine", hint=INSTALL)


def sockets(environment: Mapping[str, str] = os.environ) -> list[Path]:
    """Where engines listen unless told otherwise: Docker's, then those of a user alone, then Podman's."""
    own = Path(environment.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}")
    home = Path(environment.get("HOME") or Path.home())
    return [
        Path("/var/run/docker.sock"),
        own / "docker.sock",
        home / ".docker/run/docker.sock",  # Docker Desktop
        own / "podman/podman.sock",
        Path("/run/podman/podman.sock"),
    ]


@contextmanager
def connected(endpoint: Endpoint | None = None, timeout_s: float = ANSWER_S) -> Iterator[DockerClient]:
    """A client of the engine, closed at the end. Raises EngineError where it does not answer, DependencyError without the SDK."""
    client = connect(endpoint, timeout_s)
    try:
        yield client
    finally:
        client.close()


def connect(endpoint: Endpoint | None = None, timeout_s: float = ANSWER_S) -> DockerClient:
    """A client of the engine that has answered once; the caller closes it."""
    try:
        from docker import DockerClient
        from docker.tls import TLSConfig
    except ImportError as error:
        raise DependencyError(
            f"the package `{error.name or 'docker'}` is missing", where="container engine", hint=PACKAGE
        ) from error
    found = endpoint or find()
    tls: TLSConfig | bool = False
    with told(f"the container engine at {found.url} ({found.found_by})"):
        if found.tls is not None:
            pair = (str(found.tls / "cert.pem"), str(found.tls / "key.pem"))
            tls = TLSConfig(client_cert=pair, ca_cert=str(found.tls / "ca.pem"), verify=True)
        try:
            # The version is asked for: the SDK's own newest is refused by engines that are older.
            return DockerClient(base_url=found.url, version="auto", timeout=timeout_s, tls=tls)
        except ValueError as error:  # the SDK takes an address apart with urllib, which says so in its own way
            raise EngineError(
                f"this is no address of an engine: {error}",
                where=f"{found.url} ({found.found_by})",
                hint="write `unix:///path/docker.sock` or `tcp://host:2376`",
            ) from error


@contextmanager
def told(where: str) -> Iterator[None]:
    """Turns what the SDK and the connection raise into EngineError (DiskError for a full disk), said of `where`."""
    from docker.errors import DockerException
    from requests.exceptions import RequestException

    try:
        yield
    except TunedockError:
        raise
    except (DockerException, RequestException, OSError) as error:
        raise translated(error, where) from error


@dataclass(frozen=True, slots=True)
class _Trouble:
    pattern: str
    hint: str
    kind: type[TunedockError] = EngineError


_TROUBLES = (
    _Trouble(
        r"no space left on device",
        "free room where the engine keeps its images: `docker system df`, `docker system prune`",
        DiskError,
    ),
    _Trouble(
        r"[Pp]ermission denied|PermissionError",
        "let your user talk to the engine: `sudo usermod -aG docker $USER`, then log in again; or use a rootless engine",
    ),
    _Trouble(
        r"could not select device driver|unknown or invalid runtime name: nvidia|failed to discover GPU",
        "give containers the GPU: install nvidia-container-toolkit, `sudo nvidia-ctk runtime configure --runtime=docker`, "
        "`sudo systemctl restart docker`",
    ),
    _Trouble(
        r"[Nn]o such image|pull access denied|manifest unknown|not found: manifest",
        "make it with `tunedock image build`, or log in to its registry (`docker login`); `tunedock image list` says what there is",
    ),
    _Trouble(r"port is already allocated|address already in use", "name another port, or end what listens there"),
    _Trouble(r"is already in use by container", "remove that container first: `docker rm -f`, or name another"),
    _Trouble(
        r"unauthorized|authentication required|no basic auth credentials|denied: requested access",
        "log in to the registry: `docker login`",
    ),
    _Trouble(
        r"FileNotFoundError|ConnectionRefused|Connection refused|Cannot connect|NewConnectionError|Failed to resolve",
        "start it: `sudo systemctl start docker` (Docker Desktop: start the application); DOCKER_HOST or `docker context use` "
        "chooses another",
    ),
    _Trouble(r"[Tt]imed out|Timeout", "it may be busy, or stuck: `docker info` shows whether it answers at all"),
)  # fmt: skip
"""A piece of an engine's message -> the way out and our error; most special first."""


def translated(error: Exception, where: str) -> TunedockError:
    """An error of the SDK or the connection, as ours."""
    message = said(error)
    for trouble in _TROUBLES:
        if re.search(trouble.pattern, f"{type(error).__name__} {message}"):
            return trouble.kind(message, where=where, hint=trouble.hint)
    return EngineError(message, where=where, hint=known_way_out(message) or "the engine's own log says more")


def said(error: Exception) -> str:
    """The engine's words on one line: its `explanation`, else the innermost reason, without the wrappings of libraries."""
    explanation = getattr(error, "explanation", None)
    text = str(explanation or error)
    if not explanation and (inner := re.search(r"\((\w*Error)\((?:\d+, )?['\"]?(.*?)['\"]?\)\)", text)):
        text = f"{inner[2]} ({inner[1]})" if inner[2] else inner[1]
    return " ".join(text.split()) or type(error).__name__


def _config(environment: Mapping[str, str]) -> Path:
    home = environment.get("HOME")
    return Path(environment.get("DOCKER_CONFIG") or (Path(home) if home else Path.home()) / ".docker")


def _context(environment: Mapping[str, str]) -> Endpoint | None:
    """What `docker context use` has chosen, read from its files; None for the default."""
    import hashlib
    import json

    folder = _config(environment)
    name = environment.get("DOCKER_CONTEXT")
    if not name:
        try:
            name = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("currentContext")
        except (OSError, ValueError, AttributeError):
            name = None
    if not name or name == "default":
        return None
    key = hashlib.sha256(name.encode()).hexdigest()  # the name of a context's folder
    place = folder / "contexts/meta" / key / "meta.json"
    try:
        host = json.loads(place.read_text(encoding="utf-8"))["Endpoints"]["docker"]["Host"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise EngineError(
            f"the context `{name}` cannot be read ({type(error).__name__}: {place})",
            where="container engine",
            hint="`docker context ls` shows what there is, `docker context use default` goes back",
        ) from error
    tls = folder / "contexts/tls" / key / "docker"
    return Endpoint(str(host), f"context {name}", tls if tls.is_dir() else None)
