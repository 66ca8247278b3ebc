"""Rotary embeddings that depend on how long a row is: which paths may share one.

transformers looks at a row's largest position. `longrope` (Phi-3) switches to other factors beyond the length the model was first
trained with; `dynamic` changes its base with every length beyond that. The others (linear, yarn, llama3) do not look.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunedock.data.layout import Regime


def regime_of(text_config: Any) -> Regime | None:
    """Length of a path -> a number; paths may share a row if and only if theirs is the same. None when all may."""
    parameters = getattr(text_config, "rope_parameters", None) or getattr(text_config, "rope_scaling", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, Mapping)]  # by kind of layer (Gemma 3)
    kinds = {str(found.get("rope_type", found.get("type", "default"))) for found in nested or [parameters]}
    if not kinds & {"dynamic", "longrope"}:
        return None
    lengths = [found.get("original_max_position_embeddings") for found in nested or [parameters]]
    first = next((int(length) for length in lengths if length), None)
    boundary = first or int(
        getattr(text_config, "original_max_position_embeddings", None) or text_config.max_position_embeddings
    )
    every_length = "dynamic" in kinds

    def regime(length: int) -> int:
        if length <= boundary:
            return 0
        return length if every_length else 1

    return regime
