"""The `adapter` section: what of the model is trained, and how."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt

from tunedock.recipe.section import Fraction, Section, tagged


class Lora(Section):
    kind: Literal["lora"] = "lora"
    r: PositiveInt = 16
    """Rank."""
    alpha: PositiveFloat | None = None
    """Scale numerator; twice the rank by default."""
    dropout: Fraction = 0.0
    target_modules: str | list[str] = "all-linear"
    """Module names, or `all-linear` for every linear layer but the head."""


class Full(Section):
    kind: Literal["full"] = "full"


class Freeze(Section):
    kind: Literal["freeze"] = "freeze"
    last_n_layers: PositiveInt | None = None
    """Train the last n decoder layers."""
    trainable_modules: list[str] = []
    """Train parameters whose name contains one of these words (`norm`, `lm_head`)."""


Adapter = Annotated[
    Annotated[Lora | Full | Freeze, Field(discriminator="kind")],
    BeforeValidator(tagged("lora"), json_schema_input_type=Literal["lora", "full", "freeze"] | Lora | Full | Freeze),
]
"""`full` is `{kind: full}`, and `{r: 8}` is a LoRA."""
