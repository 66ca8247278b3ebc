"""`tunedock monitoring`: the files with which Prometheus and Grafana watch gateways and runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

GATEWAY = "http://127.0.0.1:8000"


def monitoring(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Where to write; made if it is not there.", show_default=False)
    ],
    gateway: Annotated[
        list[str] | None,
        typer.Option(
            "--gateway",
            metavar="ADDRESS",
            help=f"A gateway to scrape, as `tunedock serve` tells it; {GATEWAY} by default. Repeatable.",
            show_default=False,
        ),
    ] = None,
    runs: Annotated[
        list[str] | None,
        typer.Option(
            "--runs",
            metavar="HOST:PORT",
            help="Where `tunedock runs metrics` answers. Repeatable.",
            show_default=False,
        ),
    ] = None,
    key_file: Annotated[
        Path | None,
        typer.Option(
            "--key-file",
            metavar="FILE",
            help="A file with the key that gateways want, where Prometheus will run.",
            show_default=False,
        ),
    ] = None,
    ca_file: Annotated[
        Path | None,
        typer.Option(
            "--ca-file", metavar="FILE", help="Who signed the gateways' certificates, PEM.", show_default=False
        ),
    ] = None,
    server_name: Annotated[
        str | None,
        typer.Option(
            "--server-name",
            metavar="NAME",
            help="In the gateways' certificates, where they are reached by another.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False,
) -> None:
    """Write what Prometheus and Grafana need to watch gateways and runs: settings, alerts, dashboards.

    The folder works as it is: `prometheus --config.file=DIR/prometheus.yml`. Where a Prometheus runs already, it takes the rules,
    and its Grafana the dashboards.
    """
    from tunedock.cli.text import printable
    from tunedock.launch.scraping import Scraped, address, write

    asked = gateway or ([] if runs else [GATEWAY])
    scraped = Scraped(
        gateways=[address(text, "--gateway") for text in asked],
        runs=[address(text, "--runs") for text in runs or []],
        key_file=_absolute(key_file),
        ca_file=_absolute(ca_file),
        server_name=server_name,
    )
    for path in write(folder, scraped, over=force):
        print(printable(path))


def _absolute(path: Path | None) -> str | None:
    """Prometheus takes paths from where its settings lie."""
    return None if path is None else str(path.expanduser().absolute())
