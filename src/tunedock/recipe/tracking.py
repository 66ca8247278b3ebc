"""The `track` section: where runs are shown besides their own directory. `train.report_to` says which trackers are used.

Keys, tokens and passwords have no place here: they come from the environment.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, NonNegativeFloat, PositiveFloat

from tunedock.recipe.section import Section

Tracker = Literal["tensorboard", "mlflow", "swanlab", "wandb"]


_SECRET = re.compile(r"(://)[^/@\s'\"]+@")


def masked(text: str) -> str:
    """Text that may hold addresses, what stands before the `@` of one left out."""
    return _SECRET.sub(r"\1***@", text)


def _without_secret(url: str) -> str:
    """Raises ValueError for an address with a password in it: recipes are copied into runs, images and trackers."""
    parts = urlsplit(url)
    if parts.password or (parts.username and parts.scheme in ("http", "https")):
        raise ValueError("should be an address without a name and a password, which belong into the environment")
    return url


def _proxy(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https", "socks5", "socks5h") or not parts.hostname:
        raise ValueError("should be an address such as http://proxy.example:3128")
    return _without_secret(url)


Address = Annotated[str, AfterValidator(_without_secret)]


class Mlflow(Section):
    tracking_uri: Address | None = None
    """`http://mlflow.example:5000`, or `sqlite:///mlflow.db`; MLFLOW_TRACKING_URI by default."""


class Swanlab(Section):
    mode: Literal["online", "offline"] = "online"
    """`offline` writes files for `swanlab sync`."""
    workspace: str | None = None


class Wandb(Section):
    mode: Literal["online", "offline"] = "online"
    """`offline` writes files for `wandb sync`."""
    entity: str | None = None


class Track(Section):
    project: Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[\w .-]+$")] = "tunedock"
    """MLflow's experiment; the project of SwanLab and Weights & Biases."""
    run_name: str | None = None
    """The run directory's, by default."""
    tags: dict[str, str] = {}
    """Of your own, besides those that say what the run was made of."""
    artifacts: bool = True
    """Send recipe, account of the data, curves and evaluation to trackers that keep files (MLflow)."""
    max_adapter_mb: NonNegativeFloat = 100.0
    """Send the result too, if it is an adapter of at most this size; 0 for never."""
    timeout_s: PositiveFloat = 60.0
    """The longest that the end of a run waits for a tracker."""
    proxy: Annotated[str, AfterValidator(_proxy)] | None = None
    """The proxy trackers are reached through; http_proxy and https_proxy of the environment, by default."""
    mlflow: Mlflow = Mlflow()
    swanlab: Swanlab = Swanlab()
    wandb: Wandb = Wandb()
