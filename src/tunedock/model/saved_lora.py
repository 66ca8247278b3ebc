"""Saved LoRAs on a model: one to go on with, several merged into the weights.

Weights come from safetensors alone, and settings are judged (`recipe.adapter_files`) before PEFT sees them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tunedock.errors import ModelError
from tunedock.model.lora import begin_as, task_of
from tunedock.recipe.adapter_files import WEIGHTS, folder_of, read_adapter
from tunedock.recipe.adapters import Lora
from tunedock.run.record import read_json


def go_on_with(
    model: nn.Module, lora: Lora, *, new_ids: Sequence[int] = (), began: Mapping[str, Tensor] | None = None
) -> PeftModel:
    """The model with the adapter of `lora.continue_from`, trainable. `began`: as `model.lora.put_on` takes it.

    Raises ModelError where the adapter does not fit, or lacks the rows of tokens the recipe adds.
    """
    path = Path(str(lora.continue_from))
    settings = _settings(model, path)
    lacking = set(new_ids) - set(_rows(settings))
    if lacking and "modules_to_save" not in settings:
        raise ModelError(
            f"the adapter has no rows for {len(lacking)} of the tokens that are added",
            where=f"adapter.continue_from: {path}",
            hint="merge it (`model.adapters`) and train a new adapter with the tokens",
        )
    wrapped = _on(model, path, {**settings, "lora_dropout": lora.dropout})
    if began is not None:
        begin_as(wrapped, lora, began)
    return wrapped


def merge_into(model: nn.Module, paths: Sequence[str]) -> nn.Module:
    """The model with these adapters in its weights, one after the other. Best in float32: each merge rounds to what it has."""
    for path in map(Path, paths):
        wrapped = _on(model, path, _settings(model, path))
        try:
            model = wrapped.merge_and_unload(safe_merge=True)
        except ValueError as error:
            raise ModelError(
                f"the adapter cannot be merged: {_first(error)}", where=f"model.adapters: {path}"
            ) from None
    return model


def digest(path: str) -> str:
    """The sha256 of a saved adapter's weights and settings. Raises ModelError when they cannot be read."""
    folder = folder_of(Path(path))
    made = hashlib.sha256()
    for name in ("adapter_config.json", WEIGHTS):
        try:
            with (folder / name).open("rb") as file:
                made.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise ModelError(f"the adapter cannot be read: {error.strerror}", where=str(folder / name)) from None
    return made.hexdigest()


def _settings(model: nn.Module, path: Path) -> dict[str, Any]:
    settings = read_adapter(path)
    settings.pop("base_model_name_or_path")
    rows = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    if max(_rows(settings), default=-1) >= rows:
        raise ModelError(
            f"the adapter has rows of tokens that the model lacks: up to {max(_rows(settings))}, and it has {rows}",
            where=str(path),
            hint="give the tokens it was trained with in `model.add_tokens`, in their order",
        )
    return settings


def _rows(settings: Mapping[str, Any]) -> list[int]:
    """Tokens whose rows an adapter holds."""
    given = settings.get("trainable_token_indices") or []
    lists = list(given.values()) if isinstance(given, dict) else [given]
    if not all(isinstance(row, int) and row >= 0 for rows in lists for row in rows):
        raise ModelError("`trainable_token_indices` are no numbers of tokens", where="adapter_config.json")
    return sorted({row for rows in lists for row in rows})


def _on(model: nn.Module, path: Path, settings: Mapping[str, Any]) -> PeftModel:
    """The model with the adapter, every tensor of it found and of the right shape."""
    try:
        wrapped: PeftModel = get_peft_model(model, LoraConfig(**settings, task_type=task_of(model)))
        state = load_file(folder_of(path) / WEIGHTS)
        found = set_peft_model_state_dict(wrapped, state)
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"the adapter's weights are cut off or damaged: {_first(error)}", where=str(path), hint="copy them again"
        ) from None
    except KeyError as error:  # PEFT looks up what the model's own kind of adapter must have
        raise ModelError(
            f"the adapter does not fit this model: it has no {error}", where=str(path), hint=_hint(model, path)
        ) from None
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        raise ModelError(
            f"the adapter does not fit this model: {_last(error)}", where=str(path), hint=_hint(model, path)
        ) from None
    trained = {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    missing = sorted(trained & set(found.missing_keys))
    wrong = [*(f"{name} is missing" for name in missing), *(f"{name} is strange" for name in found.unexpected_keys)]
    if wrong:
        raise ModelError(
            f"the adapter does not fit this model: {_counted(wrong)}", where=str(path), hint=_hint(model, path)
        )
    return wrapped


def _counted(wrong: Sequence[str]) -> str:
    return wrong[0] if len(wrong) == 1 else f"{len(wrong)} tensors, the first being {wrong[0]}"


def _hint(model: nn.Module, path: Path) -> str:
    """The way out of an adapter that does not fit: of the other task, or of another model."""
    settings = read_json(folder_of(path) / "adapter_config.json")
    task = task_of(model)
    if settings.get("task_type", task) != task:
        if task == "SEQ_CLS":
            return (
                "an adapter for answers cannot become one for scores: merge it (`model.adapters`) and train a new one"
            )
        return "an adapter for scores (a reward model's) cannot answer: name the adapter of a model that does"
    return f"it was trained on {settings.get('base_model_name_or_path') or 'another model'}: give that as `model`"


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _last(error: Exception) -> str:
    """Of PyTorch's list of sizes that differ, one; else the first line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return next((line.strip() for line in lines if "size mismatch" in line), lines[0])[:300]
