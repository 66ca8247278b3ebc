"""Every error a user can act on.

    TunedockError            what happened, where (a key, a file, a row), why, and the way out
    ├── RecipeError      2   the recipe or the command line says something that cannot be
    │   └── NotBuiltError    it names something tunedock does not do yet
    ├── DataError        3   a source, a format, the accounting
    ├── ModelError       4   weights, tokenizer, chat template
    ├── RunError         5   the run directory: in use, missing, not resumable
    ├── CheckError       6   a check failed: an export that differs from its run, a machine `doctor` finds wanting
    ├── OutOfMemoryError 7   out of memory
    │   └── RowTooLargeError it may fit in smaller rows, but only from a new start
    ├── DiskError        8   the disk is full or not writable
    ├── DivergedError    9   the loss is not a number
    ├── DependencyError 10   an optional package is missing
    ├── RewardError     11   a reward function, a reward model or a judge gave no score for an answer
    ├── EngineError     12   an engine (behind an endpoint, or of containers) does not answer, or not as it should
    ├── LostPeerError   13   a process of several that train together died, or answers no more
    ├── BugError        70   tunedock's own mistake; its traceback is in the log
    └── InterruptedRun 130   stopped by the user (Ctrl-C), its state saved
        └── PreemptedRun 143 stopped by a scheduler or a container engine (SIGTERM), its state saved

The number is the process's exit code; they are stable and `docs/reference/exit-codes.md` lists them. Errors cross from the
worker to the command line as JSON (`to_json`, `from_json`), so the message is the same wherever the work ran.
"""

from __future__ import annotations

from typing import Any


class TunedockError(Exception):
    """An error the user can act on: `message` says what and why, `where` the key or row, `hint` the way out."""

    exit_code = 1

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        way_out = f"\nhint: {self.hint}" if self.hint else ""
        return f"{place}{self.message}{way_out}"

    def to_json(self) -> dict[str, Any]:
        return {"kind": type(self).__name__, "message": self.message, "where": self.where, "hint": self.hint}

    @staticmethod
    def from_json(value: dict[str, Any]) -> TunedockError:
        kind = _KINDS.get(str(value.get("kind")), BugError)
        return kind(str(value.get("message")), where=value.get("where"), hint=value.get("hint"))


class RecipeError(TunedockError):
    exit_code = 2


class NotBuiltError(RecipeError):
    """Named on purpose: what tunedock does not do yet is refused, never ignored."""


class DataError(TunedockError):
    exit_code = 3


class ModelError(TunedockError):
    exit_code = 4


class RunError(TunedockError):
    exit_code = 5


class CheckError(TunedockError):
    exit_code = 6


class OutOfMemoryError(TunedockError):
    exit_code = 7


class RowTooLargeError(OutOfMemoryError):
    """Memory ran out where the step cannot be done again in smaller rows: the supervisor starts the run anew with half."""


class DiskError(TunedockError):
    exit_code = 8


class DivergedError(TunedockError):
    exit_code = 9


class DependencyError(TunedockError):
    exit_code = 10


class RewardError(TunedockError):
    exit_code = 11


class EngineError(TunedockError):
    exit_code = 12


class LostPeerError(TunedockError):
    """What the others wait for will not come; they end too, and the run goes on from its last checkpoint."""

    exit_code = 13


class BugError(TunedockError):
    exit_code = 70


class InterruptedRun(TunedockError):  # noqa: N818 - an ending, not a mistake
    exit_code = 130


class PreemptedRun(InterruptedRun):
    """The exit code is what a shell and a container engine tell of a process that SIGTERM ended: 128 + 15."""

    exit_code = 143


def _tree(cls: type[TunedockError]) -> dict[str, type[TunedockError]]:
    found = {cls.__name__: cls}
    for child in cls.__subclasses__():
        found |= _tree(child)
    return found


_KINDS = _tree(TunedockError)


def exit_codes() -> dict[int, list[str]]:
    """Exit code -> names of the errors that end with it."""
    table: dict[int, list[str]] = {}
    for name, cls in _KINDS.items():
        table.setdefault(cls.exit_code, []).append(name)
    return dict(sorted(table.items()))
