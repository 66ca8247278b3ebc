"""A run, an exported folder, an adapter or a GGUF file -> what it is registered with: lineage, and the sums of its files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunedock.errors import DiskError, RecipeError, RunError
from tunedock.recipe.adapter_files import CONFIG, WEIGHTS
from tunedock.recipe.data_images import DATA_IMAGES
from tunedock.registry.digest import FileSum, Tell, digest_of, files_of, sums
from tunedock.registry.record import Kind, Record, Sum
from tunedock.run.record import Run, read_json
from tunedock.run.store import find, last_metrics, runs_in

EXPORTED = "export.json"
PARTS: Mapping[Kind, tuple[str, ...]] = {
    "run": ("model", "resolved.json"),
    "folder": (),
    "adapter": (),
    "gguf": ("tokenizer", "chat.json", EXPORTED, "config.json", "generation_config.json"),
}
"""What is read of a run's folder, and of that in which a GGUF file lies, besides the file; everything where nothing is said."""

LARGEST_JSON = 8 << 20


def kind_of(text: str, runs_dir: Path) -> tuple[Kind, Path]:
    """What a text names, at an absolute path. Raises RecipeError for what is no model, RunError where it is no run."""
    path = Path(text).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return "gguf", path.absolute()
    if path.is_dir() and not (path / "run.json").is_file():
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1:
            return "gguf", files[0].absolute()
        if files:
            raise RecipeError(f"there are {len(files)} GGUF files here", where=str(path), hint="name the file")
        if (path / CONFIG).is_file() and (path / WEIGHTS).is_file():
            return "adapter", path.absolute()
        if (path / "config.json").is_file():
            return "folder", path.absolute()
        raise RecipeError(
            "this folder holds no model", where=str(path), hint="a run, a folder of `tunedock export`, or a GGUF file"
        )
    run = find(text, runs_dir)
    run.require_model()
    if run.locked():
        raise RunError("a process is at work in this run", where=str(run.path), hint="register it when it has ended")
    if run.state().objective == "reward":
        raise RecipeError(
            "a reward model scores and does not answer", where=str(run.path), hint="register the model it scores"
        )
    return "run", run.path.absolute()


def record_of(kind: Kind, place: Path, runs_dir: Path, *, image: str | None, tell: Tell | None = None) -> Record:
    """Reads every file once. Raises RunError, RecipeError, DiskError for what cannot be registered."""
    if not str(place).isprintable():
        raise RecipeError("its path has characters that do not print", where="register", hint="rename the folder")
    files = sums(files_of(place, only=PARTS[kind]), tell)
    exported = {} if kind == "run" else _exported(place if place.is_dir() else place.parent)
    run = Run(place) if kind == "run" else _run_of(exported, runs_dir)
    told = {**_told_by_export(exported), **({} if run is None else _told_by_run(run))}
    if kind == "adapter":
        told |= _base_of_adapter(place)
    elif kind == "run":
        told |= _base_of_run(Run(place))
    return Record(
        kind=kind,
        digest=digest_of(files),
        files=_pairs(files),
        image=image,
        **{key: value for key, value in told.items() if value not in (None, {})},
    )


def _told_by_run(run: Run) -> dict[str, Any]:
    state = run.state()
    tracked = run.path / "trackers" / "mlflow.json"
    return {
        "run": state.name,
        "recipe_hash": state.recipe_hash,
        "git_commit": _text(state.lineage.get("git")),
        "data": _text(state.lineage.get("data")),
        "data_images": state.lineage.get(DATA_IMAGES),
        "base": state.model,
        "base_commit": _text(state.lineage.get("commit")),
        "metrics": _metrics(run),
        "mlflow_run": _text(_json(tracked).get("id")) if tracked.is_file() else None,
    }


def _metrics(run: Run) -> dict[str, float]:
    """The last losses of its training, and what evaluating the tuned model came to."""
    found = {name: value for name, value in last_metrics(run.events, ("loss", "eval_loss")).items() if "loss" in name}
    file = run.path / "eval" / "metrics.json"
    tuned = _json(file).get("tuned") if file.is_file() else None
    for name, value in (tuned if isinstance(tuned, dict) else {}).items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            found[f"eval.{name}"] = float(value)
    return {name: value for name, value in list(found.items())[:50] if value == value and abs(value) != float("inf")}


def _told_by_export(record: Mapping[str, Any]) -> dict[str, Any]:
    if not record:
        return {}
    report = record.get("report")
    kept = ("texts", "same_texts", "prompts", "same_prompts", "answers", "same_answers", "perplexity_change")
    verified = {key: report[key] for key in kept if report.get(key) is not None} if isinstance(report, dict) else None
    export = {"format": record.get("format"), "kind": record.get("kind"), "verified": verified}
    return {"run": record.get("run"), "recipe_hash": record.get("recipe_hash"), "export": export}


def _run_of(exported: Mapping[str, Any], runs_dir: Path) -> Run | None:
    """The run an export is of, where it is still here."""
    for run in runs_in(runs_dir):
        if run.name == exported.get("run"):
            return run if run.state().recipe_hash == exported.get("recipe_hash") else None
    return None


def _base_of_run(run: Run) -> dict[str, Any]:
    """The sums of a base at a path: it has no commit that says what it was."""
    lineage = run.state().lineage
    folder = _text(lineage.get("folder"))
    if lineage.get("commit") is not None or folder is None:
        return {}
    return {"base_files": _folder_sums(Path(folder))}


def _base_of_adapter(place: Path) -> dict[str, Any]:
    settings = _json(place / CONFIG)
    base, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not isinstance(base, str) or not base:
        raise RecipeError(
            "the adapter does not say which model it sits on",
            where=str(place / CONFIG),
            hint="write `base_model_name_or_path` there, and `revision`",
        )
    if Path(base).is_dir():
        return {"base": str(Path(base).absolute()), "base_commit": None, "base_files": _folder_sums(Path(base))}
    if not isinstance(revision, str) or not revision:
        raise RecipeError(
            f"the adapter sits on {base[:200]}, and does not say at which commit: it may be another model tomorrow",
            where=str(place / CONFIG),
            hint="write the commit as `revision` there",
        )
    return {"base": base, "base_commit": revision}


def _folder_sums(folder: Path) -> dict[str, Sum]:
    if not folder.is_dir():
        raise RunError(
            "the base model is not there, so nothing could say later whether it has changed", where=str(folder)
        )
    return _pairs(sums(files_of(folder)))


def _pairs(files: Mapping[str, FileSum]) -> dict[str, Sum]:
    return {name: (one.sha256, one.bytes) for name, one in files.items()}


def _exported(folder: Path) -> dict[str, Any]:
    return _json(folder / EXPORTED) if (folder / EXPORTED).is_file() else {}


def _json(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > LARGEST_JSON:
            raise RunError("too large for what it should be", where=str(file))
        value = read_json(file)
    except OSError as error:
        raise DiskError(f"it cannot be read: {error.strerror}", where=str(file)) from error
    except RecursionError:
        raise RunError("file is damaged: nested too deep", where=str(file)) from None
    if not isinstance(value, dict):
        raise RunError("this holds no object", where=str(file))
    return value


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
