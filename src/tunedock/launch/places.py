"""Where a run's stages run, by `launch.on` of its recipe."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from tunedock.errors import RunError
from tunedock.launch.compose import ComposeLauncher
from tunedock.launch.docker import DockerLauncher
from tunedock.launch.job import Launcher
from tunedock.launch.local import LocalLauncher
from tunedock.recipe.launch import Launch
from tunedock.recipe.schema import Recipe
from tunedock.run.record import Run


def launcher_for(launch: Launch) -> Launcher:
    match launch.on:
        case "docker":
            return DockerLauncher()
        case "compose":
            return ComposeLauncher()
        case "local":
            return LocalLauncher()


def ready(recipe: Recipe) -> list[str]:
    """What is worth saying of where a new training by a resolved recipe will run. Raises what keeps it from there."""
    if recipe.launch.on == "local" or recipe.train.output_dir is None:
        return []
    launcher = ComposeLauncher() if recipe.launch.on == "compose" else DockerLauncher()
    return launcher.check(recipe, Path(recipe.train.output_dir))


def launcher_of(run: Run) -> Launcher:
    """A run that cannot be read fails in its own words, where it is started."""
    with suppress(RunError, KeyError, ValueError):
        return launcher_for(Launch.model_validate(run.resolved()["recipe"].get("launch", {})))
    return LocalLauncher()
