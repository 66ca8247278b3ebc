"""What an image weighs, layer by layer, and which step made each."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Layer:
    bytes: int
    step: str
    """The instruction that made it, on one line."""


def layers(history: Sequence[Mapping[str, Any]]) -> list[Layer]:
    """An engine's history, newest first -> the layers that hold something, oldest first."""
    made = [Layer(int(entry.get("Size") or 0), step(str(entry.get("CreatedBy") or ""))) for entry in reversed(history)]
    return [layer for layer in made if layer.bytes]


def step(created_by: str) -> str:
    """`/bin/sh -c #(nop) COPY dir:5f.. in /x` and `RUN |1 A=b /bin/sh -c x # buildkit` -> the instruction as one reads it."""
    text = " ".join(created_by.split()).removesuffix("# buildkit").strip()
    text = re.sub(r"^(?:RUN )?\|\d+ .*?/bin/sh -c ", "RUN ", text)
    text = re.sub(r"^(?:RUN )?/bin/sh -c #\(nop\) +", "", text)
    text = re.sub(r"^(?:RUN )?/bin/sh -c ", "RUN ", text)
    return re.sub(r"\b(?:file|dir|multi):[0-9a-f]+ in ", "", text) or "the base image"
