"""Folders with a saved LoRA, as PEFT writes them: what adapter_config.json says, judged, and a recipe that goes on from one.

The file was made elsewhere. Only settings that are known are taken from it, and one that is not, unless it means nothing, is an
error: PEFT's own reader would import what some of them name. Weights are read by the work plane, from safetensors alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tunedock.errors import RecipeError
from tunedock.recipe.adapters import Lora
from tunedock.recipe.load import Loaded

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LARGEST_BYTES = 8 << 20
"""Of a config; a LoRA that names every module of a large model has some hundred thousand bytes."""

NAMES: Mapping[str, str] = {
    "r": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "target_modules": "target_modules",
    "exclude_modules": "exclude_modules",
    "layers_to_transform": "layers_to_transform",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
    "modules_to_save": "modules_to_save",
}
"""Our key of a LoRA -> PEFT's."""

_KEPT = ("trainable_token_indices", "target_parameters", "layers_pattern", "ensure_weight_tying", "fan_in_fan_out")
"""Further settings that decide where parameters are."""

_SAYS_NOTHING: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "megatron_core": ("megatron.core",),
    "qalora_group_size": (16,),
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),
}
"""Values, beside none at all, that change nothing of an adapter that is trained."""

_ABOUT = (
    "peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version",
)  # fmt: skip


def folder_of(path: Path) -> Path:
    """The folder with the adapter: itself, or the result of a run directory. Raises RecipeError where there is none."""
    for folder in (path, path / "model"):
        if (folder / CONFIG).is_file():
            return folder
    what = "a run that has no adapter as its result" if (path / "run.json").is_file() else "no folder with an adapter"
    raise RecipeError(
        f"this is {what}", where=str(path), hint=f"give a folder with {CONFIG} and {WEIGHTS}, or a run directory"
    )


def read_adapter(path: Path) -> dict[str, Any]:
    """Settings for PEFT's LoraConfig, of a folder or a run directory, and `base_model_name_or_path`. Raises RecipeError."""
    folder = folder_of(path)
    if not (folder / WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise RecipeError(
            "the weights are pickled, and reading pickle can run code" if pickled else f"{WEIGHTS} is missing",
            where=str(folder),
            hint="load it with PEFT where you trust it and `save_pretrained` it again" if pickled else None,
        )
    config = _read(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise RecipeError(f"an adapter of the type {config.get('peft_type')!r} is no LoRA", where=str(folder / CONFIG))
    for name, value in config.items():
        means_nothing = not value or value in _SAYS_NOTHING.get(name, ())
        if name in (*NAMES.values(), *_KEPT, *_ABOUT) or means_nothing:
            continue
        raise RecipeError(
            f"`{name}: {json.dumps(value)[:60]}` is not known here",
            where=str(folder / CONFIG),
            hint="it starts as a part of the base's weights; save it as a plain LoRA first (PEFT's "
            "`path_initial_model_for_weight_conversion`)"
            if name == "init_lora_weights"
            else "merge this adapter with what made it, and give the merged model as `model`",
        )
    kept = {name: config[name] for name in (*NAMES.values(), *_KEPT) if config.get(name) is not None}
    for name, value in kept.items():
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            kept[name] = sorted(value)  # PEFT writes a set
    return {**kept, "base_model_name_or_path": config.get("base_model_name_or_path")}


def _read(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > LARGEST_BYTES:
            raise ValueError("too large for a config")
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(f"this cannot be read: {str(error)[:200]}", where=str(file)) from None
    if not isinstance(value, dict):
        raise RecipeError("this holds no object", where=str(file))
    return value


def fill_continued(values: dict[str, Any], loaded: Loaded, derived: dict[str, str]) -> list[str]:
    """Fills the `adapter` section from the adapter it goes on from, whose path is absolute. Returns what is worth a note.

    Raises RecipeError where the recipe says otherwise than the adapter.
    """
    adapter = values["adapter"]
    path = Path(adapter["continue_from"])
    found = read_adapter(path)
    for ours, theirs in NAMES.items():
        value = found.get(theirs)
        origin = loaded.origin(("adapter", ours))
        if origin is not None and ours == "dropout":
            continue
        if origin is not None and _plain(adapter[ours]) != _plain(value):
            raise RecipeError(
                f"`adapter.{ours}: {json.dumps(adapter[ours])}`, and the adapter it goes on from has {json.dumps(value)}",
                where=str(origin),
                hint=f"drop `adapter.{ours}`: an adapter keeps its shape",
            )
        if value is not None:
            adapter[ours] = float(value) if ours in ("alpha", "dropout") and isinstance(value, int) else value
            derived[f"adapter.{ours}"] = "adapter.continue_from"
    try:
        Lora.model_validate(adapter)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0]) if first["loc"] else "r"
        raise RecipeError(
            f"`{NAMES.get(key, key)}`: {first['msg']}", where=str(folder_of(path) / CONFIG), hint="is the file damaged?"
        ) from None
    return notes_on_base(path, values["model"]["path"], found["base_model_name_or_path"])


def _plain(value: Any) -> Any:
    """A value as one that says the same: lists in any order, none for nothing."""
    if isinstance(value, list):
        return sorted(value, key=str) or None
    return value or None


def notes_on_base(adapter: Path, model: str, trained_on: Any) -> list[str]:
    """That an adapter was trained on another model, as far as names tell."""
    if not isinstance(trained_on, str) or not trained_on or _base_name(trained_on) == _base_name(model):
        return []
    return [
        f"{adapter} was trained on {trained_on[:200]}, and goes on {model} here; what differs must be the name alone"
    ]


def _base_name(path: str) -> str:
    """The last part of a hub id or a path; of a folder in the hub's cache, the model's."""
    cached = re.search(r"models--[^/\\]+--([^/\\]+)", path)
    return (cached.group(1) if cached else re.split(r"[/\\]", path.rstrip("/\\"))[-1]).lower()
