"""A gateway as a compose file: the service, and what one may want beside it. A pure function, and readable.

    gateway               what clients call; healthy once `/ready` says so, given its time to end
    postgres              profile `postgresql`: keys, limits and counts, for gateways on several machines
    prometheus, grafana   profile `monitoring`: figures, alerts and dashboards (`launch.scraping` writes their files)

In the words of `launch.compose_file`, which `docker-compose` 1.29 knows too. Passwords and keys are files in `secrets`, which their
user alone may read; a variable that stands without a value is passed on from the shell that calls compose.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from tunedock.launch import compose_services
from tunedock.launch.compose_file import limits, plain, variable, volume

NETWORK = "serving"
DATABASE = "tunedock"
STORE = f"postgresql://{DATABASE}@postgres/{DATABASE}"
PASSES = "/run/secrets/pgpass"
KEY = "/run/secrets/prometheus-key"
"""In the containers of who needs them."""


@dataclass(frozen=True, slots=True)
class Beside:
    """What stands beside the gateway."""

    folder: str
    """Of the file: `secrets` and `monitoring` are in it."""
    profiles: Collection[str] = ()
    """`postgresql`, `monitoring`."""
    variables: Collection[str] = ()
    """Of the gateway, from the shell that calls compose."""
    images: Mapping[str, str] = field(default_factory=dict)
    """Service -> image in the place of the public one."""


def gateway_file(body: Mapping[str, Any], beside: Beside, *, image: str, tls: bool) -> dict[str, Any]:
    """`body`: what the engine would be given (`launch.gateway`); `image`: by name, which its update moves."""
    service = _gateway(body, beside, image, tls)
    services: dict[str, Any] = {"gateway": plain(service)}
    secrets: dict[str, Any] = {}
    volumes: dict[str, Any] = {}
    if "postgresql" in beside.profiles:
        services["postgres"] = plain(_postgres(beside))
        secrets |= {
            name: {"file": f"{plain(beside.folder)}/secrets/{name}"} for name in ("pgpass", "postgres-password")
        }
        volumes["postgres"] = {}
    if "monitoring" in beside.profiles:
        services |= {name: plain(one) for name, one in _monitoring(beside).items()}
        volumes |= {"prometheus": {}, "grafana": {}}
    document = {"services": services, "networks": {NETWORK: {"driver": "bridge"}}}
    return document | ({"volumes": volumes} if volumes else {}) | ({"secrets": secrets} if secrets else {})


def _gateway(body: Mapping[str, Any], beside: Beside, image: str, tls: bool) -> dict[str, Any]:
    host = body["HostConfig"]
    [(port, [binding])] = host["PortBindings"].items()
    number = port.removesuffix("/tcp")
    service: dict[str, Any] = {
        "image": image,
        "entrypoint": list(body["Entrypoint"]),
        "command": list(body["Cmd"]),
        "user": body["User"],
        "init": host["Init"],
        "environment": {**dict(variable(entry) for entry in body["Env"]), **dict.fromkeys(beside.variables)},
        "labels": dict(body["Labels"]),
        "networks": [NETWORK],
        "ports": [f"{_in_brackets(binding['HostIp'])}:{binding['HostPort']}:{number}"],
        "read_only": host["ReadonlyRootfs"],
        "cap_drop": list(host["CapDrop"]),
        "security_opt": list(host["SecurityOpt"]),
        "tmpfs": [f"{place}:{options}" for place, options in host["Tmpfs"].items()],
        "volumes": [volume(mount) for mount in host["Mounts"]],
        "shm_size": host["ShmSize"],
        "stop_grace_period": f"{body['StopTimeout']}s",
        "restart": "unless-stopped",
        "logging": {"driver": host["LogConfig"]["Type"], "options": dict(host["LogConfig"]["Config"])},
        "healthcheck": _ready(number, tls=tls),
    }
    if "postgresql" in beside.profiles:
        service["environment"]["PGPASSFILE"] = PASSES
        service |= {"secrets": ["pgpass"], "depends_on": {"postgres": {"condition": "service_healthy"}}}
    return service | limits(host)


def _in_brackets(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _ready(port: str, *, tls: bool) -> dict[str, Any]:
    """Python is in the image; curl is not. The certificate is another name's than this one."""
    scheme, context = ("https", ", context=__import__('ssl')._create_unverified_context()") if tls else ("http", "")
    ask = f"import urllib.request as u; u.urlopen('{scheme}://127.0.0.1:{port}/ready', timeout=8{context})"
    return {
        "test": ["CMD", "python", "-c", ask],
        "interval": "10s",
        "timeout": "10s",
        "retries": 3,
        "start_period": "900s",
    }


def _postgres(beside: Beside) -> dict[str, Any]:
    return compose_services.database(
        DATABASE,
        image=beside.images.get("postgres"),
        network=NETWORK,
        volume="postgres",
        password={"POSTGRES_PASSWORD_FILE": "/run/secrets/postgres-password"},
        secrets=["postgres-password"],
    )


def _monitoring(beside: Beside) -> dict[str, dict[str, Any]]:
    """They begin by `--profile monitoring`."""
    files = f"{beside.folder}/monitoring"
    prometheus = compose_services.prometheus(
        {
            **{f"{files}/{name}": f"/etc/prometheus/{name}" for name in ("prometheus.yml", "serving-rules.yml")},
            f"{beside.folder}/secrets/prometheus-key": KEY,
        },
        image=beside.images.get("prometheus"),
        network=NETWORK,
        profiles=["monitoring"],
    )
    grafana = compose_services.grafana(
        f"{files}/grafana",
        "serving",
        image=beside.images.get("grafana"),
        network=NETWORK,
        profiles=["monitoring"],
    )
    return {"prometheus": prometheus, "grafana": grafana}
