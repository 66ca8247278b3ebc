"""What a Prometheus and a Grafana need to watch gateways and runs: the files of `launch/monitoring`, and who is to be scraped.

    prometheus.yml        the addresses, and the key that gateways want
    serving-rules.yml     recorded figures and alerts of gateways
    alerts.yml            alerts of trainings
    grafana/              the data source, and the dashboards in English and Chinese

`prometheus --config.file=DIR/prometheus.yml` works with the folder as it is; paths in it are those of the machine it is for.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from tunedock.errors import DiskError, RecipeError
from tunedock.launch.compose_file import yaml_text

GATEWAYS, RUNS = "tunedock-serve", "tunedock"
"""Jobs: `serving-rules.yml` asks for the first by its name."""
_ADDRESS = re.compile(
    r"(?:(?P<scheme>https?)://)?(?P<target>(?:[\w.-]+|\[[0-9A-Fa-f:.]+\]):\d{1,5})(?:/v1|/metrics)?/?", re.ASCII
)

HEADER = """\
# Written by `tunedock monitoring`: who is scraped, and what is looked for. Rules and dashboards lie beside it.
"""


@dataclass(frozen=True, slots=True)
class Address:
    """Of something that is scraped."""

    target: str
    """host:port."""
    tls: bool = False


def address(text: str, option: str) -> Address:
    """`host:port`, or as `tunedock serve` tells it: `https://host:port/v1`. Raises RecipeError."""
    found = _ADDRESS.fullmatch(text.strip())
    if found is None:
        example = "127.0.0.1:9400" if option == "--runs" else "http://127.0.0.1:8000"
        raise RecipeError(f"`{text[:200]}` is no address", where=option, hint=f"write for example {example}")
    return Address(found["target"], found["scheme"] == "https")


@dataclass(frozen=True, slots=True)
class Scraped:
    """`gateways`: by `tunedock serve`; `runs`: by `tunedock runs metrics`."""

    gateways: Sequence[Address] = ()
    runs: Sequence[Address] = ()
    key_file: str | None = None
    """With the key that gateways want (`tunedock token issue prometheus`), and nothing else; None for open ones."""
    ca_file: str | None = None
    """Of the authority that signed the gateways' certificates; None: one that the machine knows."""
    server_name: str | None = None
    """In their certificates, where they are reached by another."""


def prometheus_yaml(scraped: Scraped) -> str:
    """Of Prometheus 2 and 3."""
    rules, jobs = [], []
    if scraped.gateways:
        rules.append("serving-rules.yml")
        jobs.append(_gateways(scraped))
    if scraped.runs:
        rules.append("alerts.yml")
        jobs.append({"job_name": RUNS, "scrape_interval": "5s", "static_configs": _targets(scraped.runs)})
    document = {
        "global": {"scrape_interval": "15s", "evaluation_interval": "15s"},
        "rule_files": rules,
        "scrape_configs": jobs,
    }
    return HEADER + yaml_text(document)


def _gateways(scraped: Scraped) -> dict[str, Any]:
    job: dict[str, Any] = {"job_name": GATEWAYS}
    if scraped.key_file is not None:
        job["authorization"] = {"credentials_file": scraped.key_file}
    named = {"ca_file": scraped.ca_file, "server_name": scraped.server_name}
    if tls := {name: value for name, value in named.items() if value is not None}:
        job["tls_config"] = tls
    return job | {"static_configs": _targets(scraped.gateways)}


def _targets(addresses: Sequence[Address]) -> list[dict[str, Any]]:
    """Those with TLS say so by a label that Prometheus takes away again."""
    found: list[dict[str, Any]] = []
    plain = [one.target for one in addresses if not one.tls]
    secured = [one.target for one in addresses if one.tls]
    if plain:
        found.append({"targets": plain})
    if secured:
        found.append({"targets": secured, "labels": {"__scheme__": "https"}})
    return found


def write(folder: Path, scraped: Scraped, *, over: bool = False) -> list[Path]:
    """The files, as they lie in the folder. Raises RecipeError where one is there already, DiskError where none can be written.

    `over`: whether those that are there give way; thresholds that somebody has changed are theirs.
    """
    shipped = [*(["serving-rules.yml"] if scraped.gateways else []), *(["alerts.yml"] if scraped.runs else [])]
    source = files("tunedock.launch").joinpath("monitoring")
    with as_file(source) as found:
        shipped += sorted(str(path.relative_to(found)) for path in (found / "grafana").iterdir())
        there = next((name for name in ("prometheus.yml", *shipped) if (folder / name).exists()), None)
        if there is not None and not over:
            raise RecipeError("it is there already", where=str(folder / there), hint="another folder, or --force")
        try:
            (folder / "grafana").mkdir(parents=True, exist_ok=True)
            for name in shipped:
                shutil.copyfile(found / name, folder / name)
            (folder / "prometheus.yml").write_text(prometheus_yaml(scraped), encoding="utf-8")
        except OSError as error:
            raise DiskError(f"cannot write: {error.strerror}", where=str(folder)) from error
    return [folder / name for name in ("prometheus.yml", *shipped)]
