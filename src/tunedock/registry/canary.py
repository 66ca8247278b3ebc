"""Who is answered by a canary: a share of the subjects, always the same ones while the share stays, and more as it grows.

A subject's place in a line from 0 to 1 is a hash of its name and the model's; a share takes those up to it. So whoever was in stays
in when 10 % become 50 %, and every worker and every restart decides alike, without a list.
"""

from __future__ import annotations

import hashlib
import re

from tunedock.errors import RecipeError

_PERCENT = re.compile(r"(\d{1,3}(?:\.\d{1,2})?) ?%?", re.ASCII)
_PLACES = 1 << 64


def place_of(subject: str, model: str) -> float:
    """From 0 on, below 1."""
    name = f"{len(model)}:{model}{subject}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(name).digest()[:8], "big") / _PLACES


def is_in(subject: str, model: str, percent: float) -> bool:
    """Whether a subject is among the `percent` of a model's canary."""
    return place_of(subject, model) * 100 < percent


def parse_percent(text: str) -> float:
    """`10%`, `10`, `0.5%`. Raises RecipeError."""
    found = _PERCENT.fullmatch(text.strip())
    value = float(found[1]) if found else -1.0
    if not 0 <= value < 100:
        raise RecipeError(
            f"`{text[:20]}` is no share of a canary, which is from 0 to below 100 percent",
            where="--canary",
            hint="10%; for everybody promote without --canary",
        )
    return value
