"""Programs that answer as recorded in `doctor/`. A program without a recording is not installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tunedock.plan.machine.command import Ran

FOLDER = Path(__file__).with_name("doctor")


def recorded(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


class RecordedRunner:
    """Answers by the beginning of the command line, the longest that fits; `asked` holds every command line."""

    def __init__(self, answers: Mapping[str, Ran]) -> None:
        self._answers = answers
        self.asked: list[str] = []

    def __call__(self, arguments: Sequence[str]) -> Ran | None:
        line = " ".join(arguments)
        self.asked.append(line)
        fitting = [start for start in self._answers if line.startswith(start)]
        return self._answers[max(fitting, key=len)] if fitting else None
