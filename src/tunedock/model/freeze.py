"""Training some of a model's own parameters, the others frozen: first or last layers, and parameters by words of their names."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from tunedock.errors import ModelError
from tunedock.model.score import LAYER
from tunedock.plan.trained import in_layers
from tunedock.recipe.adapters import Freeze

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


def freeze(model: nn.Module, adapter: Freeze) -> None:
    """Leaves only what `adapter` names trainable. Raises ModelError for layers and words the model does not have."""
    names = [name for name, _ in model.named_parameters()]
    numbers = {name: int(found.group(1)) for name in names if (found := _LAYER.search(name))}
    count = max(numbers.values(), default=-1) + 1
    for key, asked in (("last_n_layers", adapter.last_n_layers), ("first_n_layers", adapter.first_n_layers)):
        if (asked or 0) > count:
            raise ModelError(f"the model has {count} layers", where=f"adapter.{key}: {asked}")
    chosen = {name for name, number in numbers.items() if in_layers(number, count, adapter)}
    _require_found("layer_modules", adapter.layer_modules, sorted(chosen))
    _require_found("trainable_modules", adapter.trainable_modules, names)
    for name, parameter in model.named_parameters():
        in_range = name in chosen and (not adapter.layer_modules or _has_a_word(name, adapter.layer_modules))
        scores = name == f"{LAYER}.weight"  # a new layer, which nothing else would train
        parameter.requires_grad_(in_range or scores or _has_a_word(name, adapter.trainable_modules))


def _has_a_word(name: str, words: Sequence[str]) -> bool:
    return any(word in name for word in words)


def _require_found(key: str, words: Sequence[str], names: Sequence[str]) -> None:
    for word in words:
        if not any(word in name for name in names):
            parts = sorted({part for name in names for part in name.split(".") if not part.isdigit()})
            shown = ", ".join(parts[:30]) + (", ..." if len(parts) > 30 else "")
            raise ModelError(
                "no parameter has this word in its name", where=f"adapter.{key}: {word}", hint=f"there are {shown}"
            )
