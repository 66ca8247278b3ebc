"""`environment.json` in a run directory: what a run is computed with. What decides a number's last digits, and has changed since
the run was last at work, is told: the same run to the bit is promised of the same machine and the same versions alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tunedock.model.kernels import status
from tunedock.model.load import find_device
from tunedock.run.record import read_json, write_json
from tunedock.train.machine import hardware, versions
from tunedock.train.training import Training

FILE = "environment.json"

DECIDING = (
    ("versions", "torch"),
    ("versions", "transformers"),
    ("hardware", "cpu"),
    ("hardware", "cores"),
    ("hardware", "gpus"),
    ("kernels",),
)


def keep_environment(training: Training) -> None:
    """Writes the file, of the first rank's machine; warns of what is other than it was where a run goes on."""
    path = training.run.path / FILE
    now = {"versions": versions(), "hardware": hardware(), "kernels": status() if find_device().type == "cpu" else None}
    if training.resume and path.is_file() and (changed := list(changes(read_json(path), now))):
        training.emit.warning(
            f"the run goes on with other means than before: {'; '.join(changed)}",
            where=str(path),
            hint="its numbers are the same but for rounding; to the bit they are only with the same machine and versions",
        )
    write_json(path, now)


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """In words. What an older version did not write down is passed over."""
    for places in DECIDING:
        old, new = _at(before, places), _at(now, places)
        if old != new and places[0] in before:
            yield f"{places[-1]} was {_said(old)}, is {_said(new)}"


def _at(content: Mapping[str, Any], places: tuple[str, ...]) -> Any:
    found: Any = content
    for place in places:
        found = found.get(place) if isinstance(found, Mapping) else None
    return found


def _said(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(str(one.get("name", one)) if isinstance(one, Mapping) else str(one) for one in value) or "none"
    return "none" if value is None else str(value)
