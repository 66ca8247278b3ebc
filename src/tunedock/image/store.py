"""Images an engine has: which are ours, what they say of themselves, and a file out of one that need not run."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tunedock.errors import EngineError
from tunedock.image.dockerfile import PLACE
from tunedock.image.reference import parse
from tunedock.image.sizes import Layer, layers

if TYPE_CHECKING:
    from docker import DockerClient

TARGET = "io.tunedock.target"
ROLE = "io.tunedock.role"
SBOM = f"{PLACE}/sbom.cdx.json"
FREEZE = f"{PLACE}/requirements.txt"
MOST = 256 << 20
"""Bytes of a file that are read out of an image."""


@dataclass(frozen=True, slots=True)
class Image:
    names: tuple[str, ...]
    id: str
    bytes: int
    """Of all layers, unpacked."""
    created: str
    platform: str
    labels: Mapping[str, str]
    user: str
    entrypoint: tuple[str, ...]
    command: tuple[str, ...]
    ports: tuple[str, ...]
    health: tuple[str, ...]
    environment: tuple[str, ...]
    digests: tuple[str, ...]
    """Of its layers, oldest first."""
    layers: tuple[Layer, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def inspect(client: DockerClient, name: str) -> Image:
    """All of one image. The caller turns the SDK's errors into ours. Raises RecipeError for what is no name."""
    image = named(client, name)
    return _image(image.attrs, layers(image.history()))


def named(client: DockerClient, name: str) -> Any:
    """The SDK's image of that name or id. Raises RecipeError for what is neither: the engine's address is made of it."""
    parse(name)
    return client.images.get(name)


def images(client: DockerClient) -> list[Image]:
    """Those that `tunedock image build` made, newest first."""
    found = [_image(image.attrs) for image in client.images.list(filters={"label": TARGET})]
    return sorted(found, key=lambda image: image.created, reverse=True)


def file(client: DockerClient, name: str, path: str) -> bytes:
    """A file's content, by a container that is made and never started. Raises EngineError for one that is not a file."""
    container = client.containers.create(named(client, name).id, ["true"], network_disabled=True)
    try:
        chunks, about = container.get_archive(path)
        if about["size"] > MOST:
            raise EngineError(f"holds {about['size']:,} bytes, more than are read", where=f"{name}: {path}")
        archive = io.BytesIO(b"".join(chunks))
    finally:
        container.remove(force=True)
    with tarfile.open(fileobj=archive) as read:
        member = next(iter(read.getmembers()), None)
        content = read.extractfile(member) if member is not None else None
        if content is None:
            raise EngineError("is no file", where=f"{name}: {path}")
        return content.read()


def _image(about: Mapping[str, Any], made: Sequence[Layer] = ()) -> Image:
    settings = about.get("Config") or {}
    return Image(
        names=tuple(about.get("RepoTags") or ()),
        id=str(about["Id"]),
        bytes=int(about.get("Size") or 0),
        created=str(about.get("Created") or ""),
        platform=f"{about.get('Os')}/{about.get('Architecture')}",
        labels=dict(sorted((settings.get("Labels") or {}).items())),
        user=str(settings.get("User") or ""),
        entrypoint=tuple(settings.get("Entrypoint") or ()),
        command=tuple(settings.get("Cmd") or ()),
        ports=tuple(settings.get("ExposedPorts") or ()),
        health=tuple((settings.get("Healthcheck") or {}).get("Test") or ()),
        environment=tuple(settings.get("Env") or ()),
        digests=tuple((about.get("RootFS") or {}).get("Layers") or ()),
        layers=tuple(made),
    )
