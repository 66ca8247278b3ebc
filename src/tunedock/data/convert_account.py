"""What a conversion did with every row: read = written + refused, exactly, each refusal with its reason and the way out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tunedock.data.account import EXAMPLES_KEPT
from tunedock.data.conversation import RowRefused
from tunedock.errors import DataError

MOST_UNREAD = 50
"""Columns told by name; a file whose rows all have names of their own takes no more."""


@dataclass(slots=True)
class Conversion:
    """What happened to the rows."""

    to: str
    out: str | None = None
    """None where nothing was written."""
    read: int = 0
    written: int = 0
    rows: int = 0
    """In the file; a pair that becomes verdicts makes two."""
    reasons: Counter[str] = field(default_factory=Counter)
    refusals: list[list[str]] = field(default_factory=list)
    """[row id, reason, detail] of the first of each reason."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Rows that lost something by `without`."""
    unread: Counter[str] = field(default_factory=Counter)
    """Columns that no format reads (an id, where a row came from) -> rows that have them; what is there is not written."""
    formats: dict[str, str] = field(default_factory=dict)
    """Source path -> its format."""

    @property
    def refused(self) -> int:
        return self.reasons.total()

    def refuse(self, row_id: str, why: RowRefused) -> None:
        self.reasons[why.reason] += 1
        if self.reasons[why.reason] <= EXAMPLES_KEPT:
            self.refusals.append([row_id, why.reason, why.detail])

    def leave(self, columns: Iterable[str]) -> None:
        for name in columns:
            self.unread[name if name in self.unread or len(self.unread) < MOST_UNREAD else "..."] += 1

    def to_json(self) -> dict[str, Any]:
        return {
            "to": self.to,
            "out": self.out,
            "read": self.read,
            "written": self.written,
            "refused": self.refused,
            "rows": self.rows,
            "reasons": dict(self.reasons.most_common()),
            "refusals": self.refusals,
            "left_out": dict(self.left_out),
            "unread": dict(self.unread.most_common()),
            "formats": self.formats,
        }

    def judge(self, max_dropped: float) -> None:
        """Raises DataError when no row, or too few of them, could be written."""
        if not self.read:
            raise DataError("there is no row in the data", where=next(iter(self.formats), None), hint="check the files")
        if self.refused and (not self.written or self.refused > max_dropped * self.read):
            share = f"{self.refused} of {self.read} rows" if self.written else f"none of {self.read} row(s)"
            first = next(iter(self.reasons.most_common()))[0]
            row_id, _, detail = next(refusal for refusal in self.refusals if refusal[1] == first)
            counts = ", ".join(f"{reason} {count}" for reason, count in self.reasons.most_common())
            raise DataError(
                f"{share} can{'not' if self.written else ''} be written as `{self.to}`, so nothing was: {counts} (first: {detail})",
                where=row_id,
                hint=_HINTS.get(first, "mend these rows")
                + ("; `--max-dropped 1` writes the others" if self.written else ""),
            )


_HINTS = {
    "call_id": "`--without ids` leaves the ids out",
    "turn_name": "`--without names` leaves the names out",
    "untrained_answer": "`--without marks` trains every answer, `--to messages` keeps the marks",
    "trained_history": "`--train-on last` takes earlier answers as context, `--to messages` says them all",
    "tool_turns": "`--to messages` and `--to sharegpt` have calls",
    "several_turns": "`--to messages` has turns; in Parquet and JSON, pairs and verdicts have them too",
    "call_beside_text": "`--to messages` has both",
    "missing_column": "name the file's own columns: `--columns prompt=question --columns completion=reply`",
}
