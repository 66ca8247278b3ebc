"""The `objective` section: a kind each, told apart by `kind`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from tunedock.recipe.objectives.likelihood import Pretrain, Sft
from tunedock.recipe.objectives.preference import Dpo, Orpo, Simpo
from tunedock.recipe.section import tagged

Objective = Annotated[
    Annotated[Sft | Pretrain | Dpo | Orpo | Simpo, Field(discriminator="kind")],
    BeforeValidator(
        tagged("sft"),
        json_schema_input_type=Literal["sft", "pretrain", "dpo", "orpo", "simpo"] | Sft | Pretrain | Dpo | Orpo | Simpo,
    ),
]
"""`dpo` is `{kind: dpo}`, and settings without a kind are sft's."""
