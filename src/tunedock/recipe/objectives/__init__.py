"""The `objective` section: a kind each, told apart by `kind`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from tunedock.recipe.objectives.likelihood import Pretrain, Sft
from tunedock.recipe.objectives.preference import Dpo, Orpo, Simpo
from tunedock.recipe.objectives.reward import Reward
from tunedock.recipe.section import tagged

Objective = Annotated[
    Annotated[Sft | Pretrain | Reward | Dpo | Orpo | Simpo, Field(discriminator="kind")],
    BeforeValidator(
        tagged("sft"),
        json_schema_input_type=Literal["sft", "pretrain", "reward", "dpo", "orpo", "simpo"]
        | Sft
        | Pretrain
        | Reward
        | Dpo
        | Orpo
        | Simpo,
    ),
]
"""`dpo` is `{kind: dpo}`, and settings without a kind are sft's."""
