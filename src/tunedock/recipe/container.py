"""`launch.container`: what a container engine is to give a run. The keys are named as the options of `docker run` are.

None of it changes what is trained. Values that hold secrets have no place here: a recipe is copied into its run.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PositiveInt

from tunedock.recipe.section import Section, shorthand, switch

UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
_SIZE = re.compile(r"(\d+)([bkmg]?)", re.IGNORECASE)
_USER = re.compile(r"\d+(:\d+)?")
_VARIABLE = re.compile(r"[A-Za-z_]\w*")
_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY", re.IGNORECASE)

ULIMITS = (
    *("core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue", "nice", "nofile", "nproc", "rss", "rtprio", "rttime"),
    *("sigpending", "stack"),
)  # fmt: skip
"""Names that `docker run --ulimit` takes."""


def size_bytes(text: str) -> int:
    """`8g` in bytes. Raises ValueError."""
    found = _SIZE.fullmatch(text)
    if found is None or not int(found.group(1)):
        raise ValueError("should be a size such as 512m or 8g")
    return int(found.group(1)) * UNITS[found.group(2).lower()]


def _size(text: str) -> str:
    size_bytes(text)
    return text


def _user(text: str) -> str:
    if text != "caller" and not _USER.fullmatch(text):
        raise ValueError("should be `caller`, or numbers such as 1000:1000")
    return text


def _variable(text: str) -> str:
    name, gives, _value = text.partition("=")
    if not _VARIABLE.fullmatch(name):
        raise ValueError("should be `NAME=value`, or `NAME` alone to pass yours on")
    if gives and _SECRET.search(name):
        raise ValueError(f"should be `{name}` alone: its value stays in your environment, and out of the run's files")
    return text


def _ulimits(limits: dict[str, int]) -> dict[str, int]:
    unknown = [name for name in limits if name not in ULIMITS]
    if unknown:
        raise ValueError(f"has no limit `{unknown[0]}`; there are {', '.join(ULIMITS)}")
    return limits


Size = Annotated[str, AfterValidator(_size)]


PUBLIC_IMAGES = ("postgres", "mlflow", "prometheus", "grafana")
"""Services beside a training whose images are not tunedock's own."""


def _images(images: dict[str, str]) -> dict[str, str]:
    unknown = [name for name in images if name not in PUBLIC_IMAGES]
    if unknown:
        raise ValueError(f"has no service `{unknown[0]}`; there are {', '.join(PUBLIC_IMAGES)}")
    return images


class Mount(Section):
    path: str
    """A file or folder of this machine; it stands at the same place in the container."""
    read_only: bool = True


class Container(Section):
    cpus: Annotated[float, Field(ge=0.01)] | None = None
    """How much of how many processors; all of them by default. A worker gets as many threads, so that it is not held back."""
    memory: Size | None = None
    """Main memory, without swap (`24g`); all there is by default."""
    shm_size: Literal["auto"] | Size = "auto"
    """Of /dev/shm; `auto` counts what the run's processes hold there."""
    gpus: Literal["auto", "all", "none"] | PositiveInt | list[int | str] = "auto"
    """`auto`: what a local run would use; `all`; `none`; so many that no other run has; or which ones (`[0, 2]`, or UUIDs)."""
    mps: Annotated[int, Field(ge=1, le=100)] | None = None
    """Share of each GPU in percent, through NVIDIA's MPS: several runs then have one GPU. Its daemon is to run on the machine."""
    devices: list[str] = []
    """Further devices, such as `/dev/kfd` and `/dev/dri` for ROCm."""
    network: Annotated[str, Field(pattern=r"^[\w.-]+$")] = "auto"
    """`auto`: none, unless the recipe needs a hub, a tracker, an endpoint or other machines; `none`, `bridge`, `host`, or the name
    of a network of the engine."""
    infiniband: Annotated[
        Literal["auto", "on", "off"], BeforeValidator(switch, json_schema_input_type=Literal["auto", "on", "off"])
    ] = "auto"
    """Whether it gets /dev/infiniband and may lock memory; `auto`: where there are several machines and this one has it."""
    ulimits: Annotated[dict[str, int], AfterValidator(_ulimits)] = {}
    """Limits of each process by their names (`{nofile: 65536}`), -1 for none."""
    runtime: str | None = None
    """An OCI runtime the engine knows: `runsc`, `kata-runtime`, `nvidia`; the engine's own by default."""
    user: Annotated[str, AfterValidator(_user)] = "caller"
    """Who the processes run as, and who owns what they write: `caller`, or numbers such as `1000:1000`."""
    read_only: bool = True
    """Whether the image's own files cannot be written. Where runs and caches are, /tmp and the home always can."""
    mounts: list[Annotated[Mount, shorthand("path", Mount)]] = []
    """Files and folders besides those that the recipe names."""
    env: list[Annotated[str, AfterValidator(_variable)]] = []
    """`NAME=value`, or `NAME` alone to pass on what your environment has; secrets only so."""
    source: bool = False
    """Run the code of the tunedock that is called, and not the image's: for work on tunedock itself."""


class Compose(Section):
    """What the compose file of a run holds beside its nodes."""

    profiles: list[Literal["tensorboard", "mlflow", "monitoring"]] = []
    """`tensorboard`: the run's curves at port 6006; `mlflow`: a tracking server at 5000, with PostgreSQL; `monitoring`: Prometheus
    at 9090 and Grafana at 3000. All of them answer this machine alone."""
    images: Annotated[dict[str, str], AfterValidator(_images)] = {}
    """In the place of the public ones, for mirrors: `{grafana: registry.example/grafana:12.2.0}`."""
    port: Annotated[int, Field(ge=1, le=65535)] = 29500
    """Where the nodes meet, on a network of their own."""
