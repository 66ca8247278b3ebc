"""The `objective` section: a kind each, told apart by `kind`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from tunedock.recipe.objectives.likelihood import Pretrain, Sft
from tunedock.recipe.objectives.preference import Dpo, Kto, Orpo, Simpo
from tunedock.recipe.objectives.reward import Reward
from tunedock.recipe.objectives.rollout import Grpo, Ppo, Rloo
from tunedock.recipe.section import tagged

Kind = Literal["sft", "pretrain", "reward", "dpo", "orpo", "simpo", "kto", "ppo", "grpo", "rloo"]
Kinds = Sft | Pretrain | Reward | Dpo | Orpo | Simpo | Kto | Ppo | Grpo | Rloo

Objective = Annotated[
    Annotated[Kinds, Field(discriminator="kind")],
    BeforeValidator(tagged("sft"), json_schema_input_type=Kind | Kinds),
]
"""`dpo` is `{kind: dpo}`, and settings without a kind are sft's."""
