"""A training as a compose file: its nodes, and what one may want to see beside them. A pure function, and readable.

    node-0, node-1, ...   the training, a container for each node; node 0 is where they meet and where the run's record is kept
    tensorboard           profile `tensorboard`: the run's curves
    mlflow, postgres      profile `mlflow`: a tracking server and its database
    metrics, prometheus,
    grafana               profile `monitoring`: what the run tells, scraped, with alerts and a dashboard

The file is of the Compose Specification, in the words that `docker-compose` 1.29 knows too: no top-level `name`, no `gpus`. Values
that hold secrets are not in it: a variable that stands without a value is passed on from the shell that calls compose.
"""

from __future__ import annotations

import io
import re
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from tunedock.launch import compose_services
from tunedock.launch.compose_services import LOOPBACK

Profile = Literal["tensorboard", "mlflow", "monitoring"]

NETWORK = "training"
BESIDE = "beside"
"""Of what is published: a network that leads nowhere publishes nothing."""
MLFLOW = "ghcr.io/mlflow/mlflow:v3.5.0"

SERVICES: dict[Profile, tuple[str, ...]] = {
    "tensorboard": ("tensorboard",),
    "mlflow": ("postgres", "mlflow"),
    "monitoring": ("metrics", "prometheus", "grafana"),
}

PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9_./-]*")
NOT_A_WORD = ("y", "n", "yes", "no", "on", "off", "true", "false", "null")

HEADER = """\
# Written by tunedock from the run's recipe; `tunedock train` writes it anew. To use it by itself:
#   docker-compose -f {path} up                                   the training
#   docker-compose -f {path} --profile monitoring up -d           and what looks at it
"""


@dataclass(frozen=True, slots=True)
class Beside:
    """What stands beside the training."""

    profiles: Collection[Profile]
    image: str
    """tunedock's own, for what is ours."""
    run: str
    """The run's folder."""
    files: str
    """The folder with the settings of Prometheus and Grafana (`launch/monitoring`)."""
    user: str
    images: Mapping[str, str]
    """Service -> image in the place of the public one, for mirrors."""
    entrypoint: Sequence[str] = ()
    """Of our image, where it has an init of its own."""
    meets: bool = True
    """Whether the nodes have a network of their own, on which they reach the tracking server as `mlflow`."""


def compose_file(nodes: Sequence[Mapping[str, Any]], beside: Beside, *, restarts: int) -> dict[str, Any]:
    """`nodes`: for each the body that the engine would be given (`launch.container`), in the order of the nodes.

    `restarts`: how often a node whose container ends by itself is started again.
    """
    services = {f"node-{number}": plain(node_service(number, spec, restarts)) for number, spec in enumerate(nodes)}
    beside = replace(beside, run=plain(beside.run), files=plain(beside.files))
    volumes: dict[str, Any] = {}
    for profile in beside.profiles:
        made, kept = _BESIDE[profile](beside)
        services |= {name: {**service, "profiles": [profile]} for name, service in made.items()}
        volumes |= kept
    networks = {
        name: settings for one in nodes for name, settings in _networks(one["HostConfig"]["NetworkMode"]).items()
    }
    networks |= {BESIDE: {"driver": "bridge"}} if beside.profiles else {}
    found: dict[str, Any] = {"services": services}
    found |= {"networks": networks} if networks else {}
    return found | ({"volumes": volumes} if volumes else {})


def _networks(mode: str) -> dict[str, Any]:
    """What the nodes meet on: one that leads nowhere else, unless the recipe needs the world outside."""
    if mode == "host":
        return {}
    if mode in ("none", "bridge"):
        return {NETWORK: {"driver": "bridge", "internal": mode == "none"}}
    return {NETWORK: {"external": True, "name": mode}}


def plain(value: Any) -> Any:
    """The same where compose has read it: a dollar sign begins a variable of compose's own unless it stands twice."""
    if isinstance(value, Mapping):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return value.replace("$", "$$") if isinstance(value, str) else value


def as_yaml(document: Mapping[str, Any], path: str) -> str:
    """`path`: where it will lie, for who reads it."""
    named = (
        shlex.quote(path) if path.isprintable() else "compose.yaml"
    )  # else a line of the path would be one of the file
    return HEADER.format(path=named) + yaml_text(document)


def yaml_text(document: Mapping[str, Any]) -> str:
    """Compose before 2 reads YAML 1.1, where `no` is false and `1:30` is ninety: what is not plainly a word is in quotes."""
    from ruamel.yaml import YAML

    writer = YAML()
    writer.indent(mapping=2, sequence=4, offset=2)
    writer.width = 120
    out = io.StringIO()
    writer.dump(_quoted(document), out)
    return out.getvalue()


def _quoted(value: Any) -> Any:
    from ruamel.yaml.scalarstring import DoubleQuotedScalarString

    if isinstance(value, Mapping):
        return {_quoted(name): _quoted(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_quoted(one) for one in value]
    if isinstance(value, str) and (not PLAIN.fullmatch(value) or value.lower() in NOT_A_WORD):
        return DoubleQuotedScalarString(value)
    return value


# -- the nodes ---------------------------------------------------------------------------------------------------------


def node_service(number: int, spec: Mapping[str, Any], restarts: int) -> dict[str, Any]:
    """A container's body in compose's words."""
    host = spec["HostConfig"]
    shared = host["NetworkMode"] == "host"
    service: dict[str, Any] = {
        "image": spec["Image"],
        "entrypoint": list(spec["Entrypoint"]),
        "command": list(spec["Cmd"]),
        "user": spec["User"],
        "working_dir": spec["WorkingDir"],
        "init": host["Init"],
        "environment": dict(variable(entry) for entry in spec["Env"]),
        "labels": dict(spec["Labels"]),
        **({"network_mode": "host"} if shared else {"hostname": f"node-{number}", "networks": [NETWORK]}),
        "read_only": host["ReadonlyRootfs"],
        "cap_drop": list(host["CapDrop"]),
        "security_opt": list(host["SecurityOpt"]),
        "tmpfs": [f"{place}:{options}" for place, options in host["Tmpfs"].items()],
        "volumes": [volume(mount) for mount in host["Mounts"]],
        "shm_size": host["ShmSize"],
        "ipc": host["IpcMode"],
        "stop_grace_period": f"{spec['StopTimeout']}s",
        "restart": f"on-failure:{restarts}" if restarts else "no",
        "logging": {"driver": host["LogConfig"]["Type"], "options": dict(host["LogConfig"]["Config"])},
        "healthcheck": _alive(spec),
    }
    return service | limits(host)


def limits(host: Mapping[str, Any]) -> dict[str, Any]:
    """What is said only where it is."""
    found: dict[str, Any] = {}
    for key, name in (("CapAdd", "cap_add"), ("GroupAdd", "group_add")):
        if host.get(key):
            found[name] = list(host[key])
    if host.get("Devices"):
        found["devices"] = [f"{one['PathOnHost']}:{one['PathInContainer']}" for one in host["Devices"]]
    if host.get("Ulimits"):
        found["ulimits"] = {one["Name"]: {"soft": one["Soft"], "hard": one["Hard"]} for one in host["Ulimits"]}
    if "Memory" in host:
        found |= {"mem_limit": host["Memory"], "memswap_limit": host["MemorySwap"]}
    if "NanoCpus" in host:
        found["cpus"] = host["NanoCpus"] / 1e9
    if "Runtime" in host:
        found["runtime"] = host["Runtime"]
    if host.get("DeviceRequests"):
        found["deploy"] = {"resources": {"reservations": {"devices": list(map(_reserved, host["DeviceRequests"]))}}}
    return found


def _reserved(request: Mapping[str, Any]) -> dict[str, Any]:
    capabilities = [name for names in request["Capabilities"] for name in names]
    ids = request.get("DeviceIDs")
    return {
        "driver": "nvidia",
        **({"device_ids": list(ids)} if ids else {"count": "all"}),
        "capabilities": capabilities,
    }


def variable(entry: str) -> tuple[str, str | None]:
    """`NAME=value`; `NAME` alone is taken from the shell."""
    name, gives, value = entry.partition("=")
    return name, value if gives else None


def volume(mount: Mapping[str, Any]) -> dict[str, Any]:
    places = {"source": mount["Source"], "target": mount["Target"]}
    return {"type": "bind", **places, **({"read_only": True} if mount["ReadOnly"] else {})}


def _alive(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Of a node. Whether training moves, its own supervisor looks at; the engine only shows it."""
    return {
        "test": ["CMD", "python", "-P", "-m", "tunedock.launch.alive", spec["WorkingDir"]],
        "interval": "30s",
        "timeout": "10s",
        "retries": 3,
        "start_period": "120s",
    }


# -- beside them -------------------------------------------------------------------------------------------------------

Services = tuple[dict[str, Any], dict[str, Any]]
"""Services, and the volumes they keep things in."""


def _ours(beside: Beside, *command: str) -> dict[str, Any]:
    """A service of tunedock's own image that only reads the run."""
    volume = {"type": "bind", "source": beside.run, "target": beside.run, "read_only": True}
    return {
        "image": beside.image,
        "entrypoint": list(beside.entrypoint),
        "command": list(command),
        "user": beside.user,
        "environment": {"HOME": "/tmp"},  # noqa: S108 - in the container, where it is a tmpfs
        "init": not beside.entrypoint,
        "read_only": True,
        "tmpfs": ["/tmp"],  # noqa: S108
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges"],
        "volumes": [volume],
        "networks": [BESIDE],
        "restart": "unless-stopped",
    }


def _tensorboard(beside: Beside) -> Services:
    command = ("tensorboard", "--logdir", f"{beside.run}/tensorboard", "--host", "0.0.0.0", "--port", "6006")  # noqa: S104
    service = {
        **_ours(beside, *command),
        "ports": [f"{LOOPBACK}:6006:6006"],
        "healthcheck": _answers("http://localhost:6006/"),
    }
    return {"tensorboard": service}, {}


def _mlflow(beside: Beside) -> Services:
    """The password is the file's own business: nobody outside its network reaches the database."""
    database = compose_services.database(
        "mlflow",
        image=beside.images.get("postgres"),
        network=BESIDE,
        volume="mlflow-database",
        password={"POSTGRES_PASSWORD": "${MLFLOW_DB_PASSWORD:-mlflow}"},
    )
    store = "postgresql://mlflow:${MLFLOW_DB_PASSWORD:-mlflow}@postgres/mlflow"
    server = {
        "image": beside.images.get("mlflow", MLFLOW),
        "command": [
            *("mlflow", "server", "--host", "0.0.0.0", "--port", "5000", "--backend-store-uri", store),  # noqa: S104
            *("--artifacts-destination", "/artifacts", "--serve-artifacts"),
        ],
        "depends_on": {"postgres": {"condition": "service_healthy"}},
        "ports": [f"{LOOPBACK}:5000:5000"],
        "volumes": [{"type": "volume", "source": "mlflow-artifacts", "target": "/artifacts"}],
        "networks": [BESIDE],
        "restart": "unless-stopped",
        "healthcheck": _answers("http://localhost:5000/health"),
    }
    return {"postgres": database, "mlflow": server}, {"mlflow-database": {}, "mlflow-artifacts": {}}


def _monitoring(beside: Beside) -> Services:
    command = ("tunedock", "runs", "metrics", beside.run, "--listen", "0.0.0.0:9400")
    ours = {**_ours(beside, *command), "healthcheck": _answers("http://localhost:9400/metrics")}

    prometheus = compose_services.prometheus(
        {f"{beside.files}/{name}": f"/etc/prometheus/{name}" for name in ("prometheus.yml", "alerts.yml")},
        image=beside.images.get("prometheus"),
        network=BESIDE,
        depends_on=["metrics"],
    )
    grafana = compose_services.grafana(
        f"{beside.files}/grafana", "training", image=beside.images.get("grafana"), network=BESIDE
    )
    return {"metrics": ours, "prometheus": prometheus, "grafana": grafana}, {"prometheus": {}, "grafana": {}}


_BESIDE: dict[Profile, Callable[[Beside], Services]] = {
    "tensorboard": _tensorboard,
    "mlflow": _mlflow,
    "monitoring": _monitoring,
}


def services_beside(profiles: Collection[Profile]) -> list[str]:
    """The services of these profiles."""
    return [name for profile in profiles for name in SERVICES[profile]]


def _answers(url: str) -> dict[str, Any]:
    """Python is in each of these images; curl is not."""
    ask = f"import urllib.request; urllib.request.urlopen({url!r}, timeout=5)"
    return {
        "test": ["CMD", "python", "-c", ask],
        "interval": "10s",
        "timeout": "10s",
        "retries": 6,
        "start_period": "30s",
    }
