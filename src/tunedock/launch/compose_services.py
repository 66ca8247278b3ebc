"""Services of public images that stand beside ours in compose files: a database, Prometheus, Grafana."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

POSTGRES = "postgres:16-alpine"
PROMETHEUS = "prom/prometheus:v3.6.0"
GRAFANA = "grafana/grafana:12.2.0"

LOOPBACK = "127.0.0.1"
"""Where what stands beside is published: none of it asks who one is."""

Service = dict[str, Any]


def database(
    name: str,
    *,
    image: str | None,
    network: str,
    volume: str,
    password: Mapping[str, str],
    secrets: Sequence[str] = (),
) -> Service:
    """PostgreSQL with a database and its user, both `name`. `password`: the variable it reads that by."""
    return {
        "image": image or POSTGRES,
        "environment": {"POSTGRES_USER": name, **password, "POSTGRES_DB": name},
        **({"secrets": list(secrets)} if secrets else {}),
        "volumes": [{"type": "volume", "source": volume, "target": "/var/lib/postgresql/data"}],
        "networks": [network],
        "restart": "unless-stopped",
        "healthcheck": {"test": ["CMD", "pg_isready", "-U", name], "interval": "5s", "timeout": "5s", "retries": 10},
    }


def prometheus(files: Mapping[str, str], *, image: str | None, network: str, **more: Any) -> Service:
    """`files`: of this machine -> their places in the container, which reads them."""
    return {
        "image": image or PROMETHEUS,
        **more,
        "ports": [f"{LOOPBACK}:9090:9090"],
        "volumes": [*_read(files), {"type": "volume", "source": "prometheus", "target": "/prometheus"}],
        "networks": [network],
        "restart": "unless-stopped",
    }


def grafana(folder: str, board: str, *, image: str | None, network: str, **more: Any) -> Service:
    """With a board of `launch.boards` in both languages. `folder`: where its files are."""
    files = {
        f"{folder}/datasource.yml": "/etc/grafana/provisioning/datasources/tunedock.yml",
        f"{folder}/dashboards.yml": "/etc/grafana/provisioning/dashboards/tunedock.yml",
        **{f"{folder}/{name}": f"/var/lib/grafana/dashboards/{name}" for name in (f"{board}.json", f"{board}.zh.json")},
    }
    return {
        "image": image or GRAFANA,
        **more,
        "depends_on": ["prometheus"],
        "environment": {"GF_AUTH_ANONYMOUS_ENABLED": "true", "GF_USERS_ALLOW_SIGN_UP": "false"},
        "ports": [f"{LOOPBACK}:3000:3000"],
        "volumes": [*_read(files), {"type": "volume", "source": "grafana", "target": "/var/lib/grafana"}],
        "networks": [network],
        "restart": "unless-stopped",
    }


def _read(files: Mapping[str, str]) -> list[dict[str, Any]]:
    return [{"type": "bind", "source": place, "target": target, "read_only": True} for place, target in files.items()]
