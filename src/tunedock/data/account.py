"""What happened to every row: read = kept + dropped, exactly, each drop with its reason and row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tunedock.errors import DataError

EXAMPLES_KEPT = 20
"""Row ids and details remembered per reason; the full list is in `drops`."""

FATAL_REASONS = ("prompt_not_prefix",)
"""Reasons that are an error whatever `data.max_dropped` says: training on the other rows would not be what serving renders."""


@dataclass(frozen=True, slots=True)
class Drop:
    row_id: str
    reason: str
    detail: str


@dataclass(slots=True)
class Account:
    read: int = 0
    kept: int = 0
    samples: int = 0
    """Samples made of the kept rows (a long document makes several, a pair read as verdicts two)."""
    drops: list[Drop] = field(default_factory=list)
    cut_rows: int = 0
    cut_tokens: int = 0
    cuts: list[tuple[str, int]] = field(default_factory=list)
    """(row id, tokens cut)."""
    duplicates: int = 0
    """Kept rows equal to an earlier one; they are kept, and reported."""
    no_stop: int = 0
    """Kept rows whose last trained token is no stop token (cut answers)."""
    formats: dict[str, str] = field(default_factory=dict)
    """Source path -> format, as detected or given."""

    @property
    def dropped(self) -> int:
        return len(self.drops)

    @property
    def reasons(self) -> dict[str, int]:
        return dict(Counter(drop.reason for drop in self.drops).most_common())

    def drop(self, row_id: str, reason: str, detail: str) -> None:
        self.drops.append(Drop(row_id, reason, detail))

    def cut(self, row_id: str, tokens: int) -> None:
        self.cut_rows += 1
        self.cut_tokens += tokens
        self.cuts.append((row_id, tokens))

    def add(self, part: Account) -> None:
        """Takes over what happened to the rows that come next in reading order."""
        for name in ("read", "kept", "samples", "cut_rows", "cut_tokens", "duplicates", "no_stop"):
            setattr(self, name, getattr(self, name) + getattr(part, name))
        self.drops += part.drops
        self.cuts += part.cuts
        self.formats |= part.formats

    def verify(self, max_dropped: float, over_length: str = "drop") -> None:
        """Raises DataError when more was dropped than the recipe's `data.max_dropped` and `data.over_length` allow."""
        if self.read != self.kept + self.dropped:
            raise AssertionError(f"accounting: read {self.read} != kept {self.kept} + dropped {self.dropped}")
        if not self.read:
            raise DataError("there is no row in the data", where="data.train", hint="check the paths and the files")
        for reason in FATAL_REASONS:
            rows = [drop for drop in self.drops if drop.reason == reason]
            if rows:
                raise DataError(
                    f"{len(rows)} row(s) refused as `{reason}`: {rows[0].detail}",
                    where=", ".join(drop.row_id for drop in rows[:5]),
                    hint="mend or remove these rows; `tunedock data show` prints their tokens",
                )
        long = [drop for drop in self.drops if drop.reason == "over_length"]
        if long and over_length == "error":
            raise DataError(
                f"{len(long)} of {self.read} rows are longer than `data.max_length` (first: {long[0].detail}), and "
                "`data.over_length: error` allows none",
                where=", ".join(drop.row_id for drop in long[:5]),
                hint="raise `data.max_length`, shorten these rows, or set `data.over_length` to truncate or drop",
            )
        if not self.kept:
            raise DataError(
                f"all {self.read} rows were dropped: {self._summary()}", where="data.train", hint=self._hint()
            )
        if self.dropped > max_dropped * self.read:
            share = self.dropped / self.read
            raise DataError(
                f"{self.dropped} of {self.read} rows ({share:.1%}) were dropped, more than `data.max_dropped: "
                f"{max_dropped:g}` allows: {self._summary()}",
                where="data.train",
                hint=self._hint(),
            )

    def _hint(self) -> str:
        """The way out of the commonest reason, where it has one of its own."""
        return _HINTS.get(next(iter(self.reasons)), _HINT)

    def _summary(self) -> str:
        parts = []
        for reason, count in self.reasons.items():
            first = next(drop for drop in self.drops if drop.reason == reason)
            parts.append(f"{reason} {count} (first: {first.row_id}: {first.detail})")
        return "; ".join(parts)

    def to_json(self) -> dict[str, Any]:
        return {
            "read": self.read,
            "kept": self.kept,
            "dropped": self.dropped,
            "reasons": self.reasons,
            "samples": self.samples,
            "cut_rows": self.cut_rows,
            "cut_tokens": self.cut_tokens,
            "duplicates": self.duplicates,
            "no_stop": self.no_stop,
            "formats": self.formats,
            "drops": [[drop.row_id, drop.reason, drop.detail] for drop in self.drops],
            "cuts": [list(cut) for cut in self.cuts],
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Account:
        keys = ("read", "kept", "samples", "cut_rows", "cut_tokens", "duplicates", "no_stop", "formats")
        account = cls(**{key: value[key] for key in keys})
        account.drops = [Drop(*drop) for drop in value["drops"]]
        account.cuts = [(row_id, tokens) for row_id, tokens in value["cuts"]]
        return account

    def examples(self, reason: str) -> Sequence[Drop]:
        return [drop for drop in self.drops if drop.reason == reason][:EXAMPLES_KEPT]


_HINT = "`tunedock data check` lists every dropped row; mend them, or raise `data.max_dropped`"

_HINTS = {
    "template_refused": "many templates want user and assistant to alternate, and some know no system message: drop "
    "`data.system` or the system turns, or give another template in `model.chat_template`",
    "missing_column": "name the file's own columns by `columns: {prompt: ..., completion: ...}`, and check "
    "`data.split.group_by` and `format`; `tunedock data check` lists every dropped row",
    "over_length": "raise `data.max_length`, or set `data.over_length: truncate`; `tunedock data check` shows the lengths",
}
