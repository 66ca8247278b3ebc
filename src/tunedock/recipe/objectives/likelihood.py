"""Likelihood: `sft` and `pretrain`."""

from __future__ import annotations

from typing import Literal

from tunedock.recipe.section import Section


class Sft(Section):
    """Maximum likelihood on conversations."""

    kind: Literal["sft"] = "sft"


class Pretrain(Section):
    """Maximum likelihood on documents."""

    kind: Literal["pretrain"] = "pretrain"
