"""What `data check` leaves on disk: every dropped and cut row by name, and the account for people.

report.md       to read: the account, reasons with their first rows, sizes, lengths
report.json     the same figures for a program
dropped.jsonl   each dropped row: row_id, reason, detail
cut.jsonl       each cut row: row_id, tokens cut
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from tunedock.data.account import Account
from tunedock.errors import DiskError
from tunedock.run.record import write_atomic, write_json

BINS = 12
"""About so many bins; their width is rounded to 1, 2 or 5 times a power of ten."""
BAR_WIDTH = 40
ROWS_NAMED = 5
"""Rows named per reason in report.md; dropped.jsonl names all."""


class Histogram(TypedDict):
    edges: list[int]
    """One more than `counts`; bin i holds edges[i] <= length < edges[i + 1]."""
    counts: list[int]


class LengthStatistics(TypedDict):
    """Tokens; null when there is no sample."""

    min: int | None
    median: float | None
    p95: int | None
    max: int | None


def histogram(lengths: Sequence[int]) -> Histogram:
    """Counts of lengths in about 12 bins between round numbers."""
    if not lengths:
        return {"edges": [], "counts": []}
    low, high = min(lengths), max(lengths)
    width = _round_width((high + 1 - low) / BINS)
    first = low // width
    counts = [0] * (high // width - first + 1)
    for length in lengths:
        counts[length // width - first] += 1
    return {"edges": [(first + i) * width for i in range(len(counts) + 1)], "counts": counts}


def length_statistics(lengths: Sequence[int]) -> LengthStatistics:
    """Shortest, median, 95th percentile (the length that 95% of the samples do not exceed) and longest."""
    if not lengths:
        return {"min": None, "median": None, "p95": None, "max": None}
    ordered = sorted(lengths)
    p95 = ordered[math.ceil(0.95 * len(ordered)) - 1]
    return {"min": ordered[0], "median": float(statistics.median(ordered)), "p95": p95, "max": ordered[-1]}


def write_report(folder: Path, result: Mapping[str, Any]) -> Path:
    """Writes the four files and returns report.md.

    `result`: {"account": Account.to_json(), "splits": {side: {"samples", "tokens", "trained_tokens"}}, "histogram", "lengths",
    "trained_share", "empty_answers", "duplicates", "no_stop"}. Raises DiskError when the folder cannot be written.
    """
    account = Account.from_json(result["account"])
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(
            f"the report's folder cannot be made: {error.strerror}",
            where=str(folder),
            hint="pick another place with --to",
        ) from error
    drops = ({"row_id": drop.row_id, "reason": drop.reason, "detail": drop.detail} for drop in account.drops)
    write_atomic(folder / "dropped.jsonl", _lines(drops))
    write_atomic(folder / "cut.jsonl", _lines({"row_id": row_id, "tokens": tokens} for row_id, tokens in account.cuts))
    figures = {key: value for key, value in result["account"].items() if key not in ("drops", "cuts")}
    write_json(folder / "report.json", {**result, "account": figures})
    path = folder / "report.md"
    write_atomic(path, _encodable("\n".join(_markdown(account, result)) + "\n"))
    return path


def _round_width(least: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, ... that is not below `least`."""
    power = 10 ** max(math.floor(math.log10(least)), 0) if least > 1 else 1
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least)


def _encodable(text: str) -> str:
    """Half of a surrogate pair, which JSON can bring and UTF-8 cannot hold, as its escape."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return _encodable("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _markdown(account: Account, result: Mapping[str, Any]) -> Iterator[str]:
    yield "# Data check"
    yield ""
    yield from _table(("rows", "count"), _account_rows(account))
    if account.drops:
        yield ""
        yield "## Dropped"
        yield ""
        yield from _table(("reason", "rows", "share", "first rows"), _reason_rows(account), numbers=(1, 2))
        yield ""
        yield "`dropped.jsonl` names every dropped row."
    if account.cuts:
        yield ""
        yield "`cut.jsonl` names every cut row, with the tokens it lost."
    yield ""
    yield "## Samples"
    yield ""
    keys = ("samples", "tokens", "trained_tokens")
    sizes = [(name, *(f"{side[key]:,}" for key in keys)) for name, side in result["splits"].items()]
    yield from _table(("split", "samples", "tokens", "trained tokens"), sizes, numbers=(1, 2, 3))
    yield ""
    yield f"Tokens that carry loss: {result['trained_share']:.1%}."
    yield from _length_lines(result["lengths"], result["histogram"])
    if account.formats:
        yield ""
        yield "## Sources"
        yield ""
        yield from _table(
            ("source", "format"), [(_cell(path), _cell(kind)) for path, kind in account.formats.items()], numbers=()
        )


def _account_rows(account: Account) -> list[tuple[str, str]]:
    rows = [
        ("read", account.read),
        ("kept", account.kept),
        ("dropped", account.dropped),
        ("cut to `data.max_length`", account.cut_rows),
        ("tokens cut", account.cut_tokens),
        ("equal to an earlier row (kept)", account.duplicates),
        ("without a stop token at the end", account.no_stop),
        ("samples made", account.samples),
    ]
    return [(name, f"{count:,}") for name, count in rows]


def _reason_rows(account: Account) -> Iterator[tuple[str, ...]]:
    for reason, count in account.reasons.items():
        drops = account.examples(reason)[:ROWS_NAMED]
        named = "; ".join(f"{_cell(drop.row_id)}: {_cell(drop.detail)}" for drop in drops)
        yield reason, f"{count:,}", f"{count / account.read:.2%}", named + (" ..." if count > len(drops) else "")


def _length_lines(lengths: LengthStatistics, bins: Histogram) -> Iterator[str]:
    if lengths["max"] is None:
        return
    yield ""
    yield "## Tokens in a sample"
    yield ""
    yield f"min {lengths['min']:,}, median {lengths['median']:,.0f}, 95% up to {lengths['p95']:,}, max {lengths['max']:,}"
    yield ""
    yield "```"
    most = max(bins["counts"])
    for start, end, count in zip(bins["edges"], bins["edges"][1:], bins["counts"], strict=False):
        bar = "#" * (max(round(BAR_WIDTH * count / most), 1) if count else 0)
        yield f"{start:>9,} to {end - 1:>9,}  {count:>9,}  {bar}".rstrip()
    yield "```"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = (1,)) -> Iterator[str]:
    """A Markdown table; the columns in `numbers` stand right."""
    yield f"| {' | '.join(head)} |"
    yield f"|{'|'.join('---:' if column in numbers else '---' for column in range(len(head)))}|"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _cell(text: str) -> str:
    """Text from the data, kept from breaking the table or becoming markup."""
    return re.sub(r"([\\`*_{}\[\]<>|~#!&])", r"\\\1", " ".join(text.split()))
