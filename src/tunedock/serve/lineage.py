"""The run a model is of, and where it came from, as an endpoint tells it: from the run, or from what an export says of its run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunedock.errors import ModelError, RecipeError
from tunedock.recipe.data_images import DATA_IMAGES
from tunedock.recipe.schema import Recipe
from tunedock.run.record import Run, read_json


def answering(place: str) -> tuple[Run, Recipe]:
    """A run whose result answers. Raises RunError where it has none, RecipeError where that is a reward model."""
    run = Run.open(Path(place))
    run.require_model()
    recipe = Recipe.model_validate(run.resolved()["recipe"])
    if recipe.objective.kind == "reward":
        raise RecipeError(
            "a reward model scores and does not answer", where=str(run.path), hint="serve the model it scores"
        )
    return run, recipe


def of_run(run: Run) -> dict[str, Any]:
    state = run.state()
    lineage = {
        "run": state.name,
        "recipe_hash": state.recipe_hash,
        "model": state.model,
        "commit": state.lineage.get("commit"),
        "data": state.lineage.get("data"),
        "data_images": state.lineage.get(DATA_IMAGES),
    }
    return {key: value for key, value in lineage.items() if value}


def of_export(folder: Path) -> dict[str, Any]:
    """Nothing of a folder from elsewhere. Raises ModelError for an export.json that is none."""
    if not (folder / "export.json").is_file():
        return {}
    record = read_json(folder / "export.json")
    if not isinstance(record, dict):
        raise ModelError("it is not what an export writes", where=str(folder / "export.json"), hint="export again")
    return {key: record[key] for key in ("run", "recipe_hash", "format", "kind") if record.get(key)}
