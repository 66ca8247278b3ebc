"""How long training takes: the operations it needs over those a device does in a second.

A card's figure is its maker's (`cards.json`). A machine's own is measured in a moment by the work plane (`train.estimate`) and
kept, with what it was measured on, so that the next plan need not load torch for it.

Operations a token: forward 2 and backward 4 a parameter when all weights are trained; with a frozen base the weights' own gradients
(2 of the 4) fall away. The head counts for trained tokens only.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tunedock.errors import DiskError, RunError
from tunedock.plan.machine.cards import find
from tunedock.plan.machine.system import cores_here, processor_name
from tunedock.run.record import read_json, write_json

EFFICIENCY: Mapping[str, float] = {"cpu": 0.35, "cuda": 0.4}
"""Share of a plain product's speed that training reaches."""

CHECKPOINTING = 4 / 3
"""Times the operations where every layer's activations are computed again."""


def operations(body: int, head: int, tokens: float, trained_tokens: float, *, full: bool) -> float:
    """Of training over `tokens`, of which `trained_tokens` go through the head; `body` and `head` are numbers of parameters."""
    return (6 if full else 4) * (body * tokens + head * trained_tokens)


class Speeds:
    """What was measured on this machine, in a file that need not be there."""

    def __init__(self, file: Path | None = None) -> None:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self._file = file or caches / "tunedock" / "speeds.json"

    def get(self, kind: str) -> float | None:
        """Teraflops of a device of this `kind` with products as a run would make them; None where nobody has measured them yet, or
        on another machine."""
        found = self._read().get(_key(kind))
        return float(found) if isinstance(found, int | float) and found > 0 else None

    def put(self, kind: str, teraflops: float) -> None:
        """Keeps a figure. A folder that cannot be written costs the next plan a moment, and nothing else."""
        with suppress(OSError, DiskError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._file, {**self._read(), _key(kind): teraflops})

    def _read(self) -> dict[str, Any]:
        try:
            found = read_json(self._file)
        except (OSError, RunError):
            return {}
        return found if isinstance(found, dict) else {}


def _key(kind: str) -> str:
    """What a speed depends on."""
    try:
        torch = version("torch")
    except PackageNotFoundError:
        torch = "none"
    cards = ", ".join(card.name for card in find().cards)
    return f"{kind}; {processor_name()}, {cores_here()} cores; {cards or 'no card'}; torch {torch}"
