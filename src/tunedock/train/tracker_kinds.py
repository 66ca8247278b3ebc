"""The trackers by name, each through accelerate's class of it: opened, told points, finished with files.

`require` says before a training begins what is missing; everything else that goes wrong is a warning (`train.trackers`).
"""

from __future__ import annotations

import logging
import netrc
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from tunedock.errors import DependencyError, RecipeError
from tunedock.recipe.schema import Recipe
from tunedock.recipe.tracking import Track

MLFLOW_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds; MLflow's own default is 120, seven times over
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
}
BATCH = 500
"""Points of one request; MLflow takes at most 1,000 metrics in one."""


@dataclass(frozen=True, slots=True)
class Point:
    """Values of one step by the trackers' names."""

    step: int
    time: float
    """Seconds since the epoch."""
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class About:
    """What a tracker is told of a run."""

    name: str
    folder: Path
    """For the tracker's own files."""
    config: Mapping[str, Any]
    """The recipe, flat."""
    lineage: Mapping[str, str]
    track: Track


@dataclass(slots=True)
class Kind:
    """One tracker of one run. `id` is its name for the run, kept so that a resumed run goes on in the same one."""

    about: About
    id: str | None = None
    tracker: Any = field(default=None, repr=False)
    name: ClassVar[str]
    package: ClassVar[str]
    secret: ClassVar[str | None] = None

    def open(self) -> str:
        """Begins or goes on; returns the id. Whatever the package raises comes through."""
        raise NotImplementedError

    def log(self, points: Sequence[Point]) -> None:
        for point in points:
            self.tracker.log(dict(point.values), step=point.step)

    def finish(self, status: str, final: Mapping[str, float], files: Sequence[tuple[Path, str]]) -> None:
        """`status`: finished, failed or interrupted; `files` and the folder each goes to."""
        raise NotImplementedError

    def way_out(self) -> str:
        """What a user can do when it fails."""
        raise NotImplementedError


class MlflowKind(Kind):
    name = "mlflow"
    package = "mlflow-skinny"

    def open(self) -> str:
        for name, value in MLFLOW_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        import mlflow
        from accelerate.tracking import MLflowTracker

        _accelerate()
        logging.getLogger("mlflow").setLevel(logging.ERROR)
        if self.about.track.mlflow.tracking_uri is not None:
            mlflow.set_tracking_uri(self.about.track.mlflow.tracking_uri)
        self.tracker = MLflowTracker(
            experiment_name=self.about.track.project,
            run_id=self.id,
            run_name=self.about.name,
            tags=None if self.id else {**self.about.lineage, **self.about.track.tags},
        )
        self.tracker.start()
        self.id = str(self.tracker.tracker.info.run_id)
        self.tracker.store_init_configuration({key: _text(value) for key, value in self.about.config.items()})
        return self.id

    def log(self, points: Sequence[Point]) -> None:
        """Many points in one request, each with its own time; accelerate's class sends a request a step."""
        from mlflow.entities import Metric
        from mlflow.tracking import MlflowClient

        metrics = [
            Metric(name, value, round(point.time * 1000), point.step)
            for point in points
            for name, value in point.values.items()
        ]
        client = MlflowClient()
        for start in range(0, len(metrics), BATCH):
            client.log_batch(str(self.id), metrics=metrics[start : start + BATCH])

    def finish(self, status: str, final: Mapping[str, float], files: Sequence[tuple[Path, str]]) -> None:
        import mlflow

        if final:
            mlflow.log_metrics(dict(final))
        for path, folder in files:
            if path.is_dir():
                mlflow.log_artifacts(str(path), folder or None)
            else:
                mlflow.log_artifact(str(path), folder or None)
        mlflow.end_run({"finished": "FINISHED", "interrupted": "KILLED"}.get(status, "FAILED"))

    def way_out(self) -> str:
        return "look whether the server of `track.mlflow.tracking_uri` answers, or set `train.report_to: tensorboard`"


class SwanlabKind(Kind):
    name = "swanlab"
    package = "swanlab"
    secret = "SWANLAB_API_KEY"  # noqa: S105 - the variable's name

    def open(self) -> str:
        from accelerate.tracking import SwanLabTracker

        _accelerate()
        self.id = self.id or uuid.uuid4().hex[:8]
        self.about.folder.mkdir(parents=True, exist_ok=True)
        settings = self.about.track.swanlab
        self.tracker = SwanLabTracker(
            self.about.track.project,
            name=self.about.name,
            mode=settings.mode,
            workspace=settings.workspace,
            log_dir=str(self.about.folder),
            id=self.id,
            resume="allow",
            config=_config(self.about),
        )
        self.tracker.start()
        return self.id

    def finish(self, status: str, final: Mapping[str, float], files: Sequence[tuple[Path, str]]) -> None:
        import swanlab

        if final:
            swanlab.log(dict(final))
        swanlab.finish(state="success" if status == "finished" else "crashed")

    def way_out(self) -> str:
        return (
            "set `track.swanlab.mode: offline` and send the run later with `swanlab sync`, or look at network and proxy"
        )


class WandbKind(Kind):
    name = "wandb"
    package = "wandb"
    secret = "WANDB_API_KEY"  # noqa: S105 - the variable's name

    def open(self) -> str:
        import wandb
        from accelerate.tracking import WandBTracker

        _accelerate()
        self.id = self.id or uuid.uuid4().hex[:8]
        self.about.folder.mkdir(parents=True, exist_ok=True)
        self.tracker = WandBTracker(
            self.about.track.project,
            name=self.about.name,
            mode=self.about.track.wandb.mode,
            entity=self.about.track.wandb.entity,
            dir=str(self.about.folder),
            id=self.id,
            resume="allow",
            config=_config(self.about),
            tags=[f"{key}:{value}"[:64] for key, value in self.about.track.tags.items()],
            settings=wandb.Settings(
                console="off", silent=True, disable_git=True, save_code=False, x_disable_stats=True, init_timeout=20
            ),
        )
        self.tracker.start()
        return self.id

    def finish(self, status: str, final: Mapping[str, float], files: Sequence[tuple[Path, str]]) -> None:
        import wandb

        if wandb.run is not None:
            wandb.run.summary.update(dict(final))
        wandb.finish(exit_code=0 if status == "finished" else 1)

    def way_out(self) -> str:
        return "set `track.wandb.mode: offline` and send the run later with `wandb sync`, or look at network and proxy"


KINDS: Mapping[str, type[Kind]] = {kind.name: kind for kind in (MlflowKind, SwanlabKind, WandbKind)}


def require(recipe: Recipe) -> None:
    """Raises DependencyError and RecipeError for what a named tracker lacks: package, address, key."""
    for name in recipe.train.report_to:
        kind = KINDS.get(name)
        if kind is None:
            continue
        if find_spec(name) is None:
            raise DependencyError(
                f"the tracker needs the package {kind.package}, which is not installed",
                where=f"train.report_to: {name}",
                hint=f"`pip install 'tunedock[{name}]'`, or take {name} out",
            )
        if name == "mlflow" and not (recipe.track.mlflow.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")):
            raise RecipeError(
                "nothing says where MLflow is",
                where="track.mlflow.tracking_uri",
                hint="give it there or as MLFLOW_TRACKING_URI: `http://mlflow.example:5000`, or `sqlite:///mlflow.db`",
            )
        mode = getattr(getattr(recipe.track, name), "mode", None)
        if mode == "online" and kind.secret and not os.environ.get(kind.secret) and not _logged_in(name):
            raise RecipeError(
                f"there is no key for {name}",
                where=f"track.{name}.mode: online",
                hint=f"set {kind.secret} in the environment (never in the recipe), or `track.{name}.mode: offline`",
            )


def _logged_in(name: str) -> bool:
    """Whether the package's own login has left a key."""
    if name == "swanlab":
        return (Path.home() / ".swanlab" / ".netrc").is_file()
    try:
        hosts = netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return any("wandb" in host for host in hosts)


def _accelerate() -> None:
    """Its trackers ask which of several processes this is."""
    from accelerate import PartialState

    PartialState()


def _config(about: About) -> dict[str, Any]:
    own = {f"tags.{key}": value for key, value in about.track.tags.items()}
    return {**about.config, **about.lineage, **own}


def _text(value: Any) -> Any:
    """MLflow's parameters are short text; accelerate drops longer ones."""
    return value if not isinstance(value, str) or len(value) <= 500 else f"{value[:497]}..."
