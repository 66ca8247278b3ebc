"""The `objective` section: a kind each, told apart by `kind`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from tunedock.recipe.objectives.likelihood import Pretrain, Sft
from tunedock.recipe.objectives.preference import Dpo
from tunedock.recipe.section import tagged

Objective = Annotated[
    Annotated[Sft | Pretrain | Dpo, Field(discriminator="kind")],
    BeforeValidator(tagged("sft"), json_schema_input_type=Literal["sft", "pretrain", "dpo"] | Sft | Pretrain | Dpo),
]
"""`dpo` is `{kind: dpo}`, and settings without a kind are sft's."""
