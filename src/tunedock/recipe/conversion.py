"""What a conversion of data is told: the request of the stage `data-convert`, made in one plane and read in the other."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tunedock.recipe.schema import Source
from tunedock.recipe.section import Fraction, Section

Format = Literal["messages", "sharegpt", "alpaca", "prompt_completion", "text", "preference", "labelled"]
Spelling = Literal["trl", "openai", "llamafactory"]
Part = Literal["ids", "names", "marks", "reasoning"]


class Order(Section):
    """Sources, and the file their rows become."""

    sources: list[Source] = Field(min_length=1)
    to: Format
    out: str
    """Absolute."""
    spelling: Spelling = "trl"
    """Whose columns pairs and verdicts have."""
    force: bool = False
    """Files in the way are replaced."""
    refused: str | None = None
    """Absolute; where every refused row is named, a JSON object a line."""
    max_dropped: Fraction = 0.0
    """More refused rows than this share is an error, and nothing is written."""
    system: str | None = None
    """As `data.system`."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """With `last`, answers before the last are marked as not trained, which is what they would be."""
    without: list[Part] = Field(default_factory=list)
    """Parts of turns that are left out: ids of calls, names of speakers, marks of what is trained, reasoning."""
    hub: str = "hf"
    offline: bool = False
