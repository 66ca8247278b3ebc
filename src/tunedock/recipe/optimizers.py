"""What is known of optimizers by name, without torch: the table `optimizers.json`. Names are those of transformers, and `muon`.

A name the table has as `refused` is one that transformers takes and tunedock does not; the reason stands there.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal


@dataclass(frozen=True, slots=True)
class Facts:
    """A row of the table."""

    bytes: float = 0.0
    """State a trained number."""
    matrix_bytes: float | None = None
    """The same for matrices of hidden layers, where that differs."""
    low_rank: Literal["moments", "projection"] | None = None
    """What is held of targeted matrices at a low rank: two moments and the projection, or the projection alone."""
    stores: str = ""
    adam: bool = False
    """Whether `train.adam_beta1`, `adam_beta2` or `adam_epsilon` mean something to it."""
    package: str | None = None
    """Its name on PyPI; None where tunedock brings what it takes."""
    module: str | None = None
    extra: str | None = None
    """The extra of tunedock that brings the package."""
    note: str = ""
    refused: str | None = None
    instead: str | None = None

    @property
    def install(self) -> str:
        return f"pip install 'tunedock[{self.extra}]'" if self.extra else f"pip install {self.package}"


_USUAL = "adamw_torch"
"""What somebody means who writes `adam` and something near no other name."""


@cache
def table() -> Mapping[str, Facts]:
    text = files("tunedock.recipe").joinpath("optimizers.json").read_text(encoding="utf-8")
    return {name: Facts(**row) for name, row in json.loads(text).items()}


def known() -> list[str]:
    """Names that can be trained with."""
    return [name for name, facts in table().items() if facts.refused is None]


def why_not(name: str) -> tuple[str, str] | None:
    """What is wrong with a name, and the way out; None when nothing is."""
    facts = table().get(name)
    if facts is None:
        near = difflib.get_close_matches(name, known(), n=1, cutoff=0.8)
        near = near or ([_USUAL] if name.lower().startswith("adam") else difflib.get_close_matches(name, known(), n=1))
        return f"there is no optimizer `{name}`", (
            f"did you mean `{near[0]}`?" if near else f"known: {', '.join(sorted(known()))}"
        )
    if facts.refused is not None:
        return f"`{name}` is not taken: {facts.refused}", f"use `{facts.instead}`"
    return None
