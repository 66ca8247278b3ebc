"""Objectives on preferences."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from tunedock.recipe.section import Section


class Dpo(Section):
    """Direct preference optimization: of two answers to a prompt, the chosen one is made likelier than the rejected one."""

    kind: Literal["dpo"] = "dpo"
    beta: PositiveFloat = 0.1
    """How close to stay to the model training began with; larger is closer."""
    loss_type: Literal["sigmoid"] = "sigmoid"
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    """Share of pairs taken to be labelled the wrong way round."""
    precompute_ref_log_probs: bool = False
    """Ask the reference about all rows before the first step, and keep no copy of it (whole weights, `freeze`)."""
