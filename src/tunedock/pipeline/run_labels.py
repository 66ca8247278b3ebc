"""What an image that was made for a run says of it, and what of the run is served."""

from __future__ import annotations

import json
from pathlib import Path

from tunedock.run.record import Run
from tunedock.run.store import find, last_metrics

PREFIX = "io.tunedock"


def labels_of(name: str, runs_dir: Path) -> dict[str, str]:
    """Recipe, data, model, adapter and newest metrics of a run, as labels. Raises RunError where there is no such run."""
    run = find(name, runs_dir)
    state = run.state()
    found = {
        "run": state.name,
        "objective": state.objective,
        "model": state.model,
        "model-commit": state.lineage.get("commit"),
        "adapter": state.adapter,
        "recipe-hash": state.recipe_hash,
        "data-fingerprint": state.lineage.get("data"),
        "metrics": json.dumps(last_metrics(run.events), sort_keys=True) or None,
    }
    return {f"{PREFIX}.{key}": str(value) for key, value in found.items() if value}


def served_by(name: str, runs_dir: Path) -> tuple[str | None, str | None]:
    """(model, adapter): the folders to put into a serving image. Of an adapter whose base is a hub's the model is None."""
    run = find(name, runs_dir)
    run.require_model()
    if not (run.model / "adapter_config.json").exists():
        return str(run.model), None
    return _base(run), str(run.model)


def _base(run: Run) -> str | None:
    named = run.resolved()["recipe"]["model"]
    path = named.get("path") if isinstance(named, dict) else named
    return str(path) if path and Path(path).is_dir() else None
