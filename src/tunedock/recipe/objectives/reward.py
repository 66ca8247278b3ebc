"""The reward model."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeFloat

from tunedock.recipe.section import Section


class Reward(Section):
    """A reward model: of two answers to a prompt, the chosen one gets the higher score. Rows may say by how much (`margin`)."""

    kind: Literal["reward"] = "reward"
    center_rewards_coefficient: NonNegativeFloat = 0.0
    """Weight of the squared sum of a pair's two scores, which keeps scores around 0 (0.01 is usual)."""
