"""A source's `columns` held against its rows: a name that means nothing, or a column that is not there, is a mistake to be told."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from tunedock.data.formats import CHOSEN, COMPLETION, LABEL, MARGIN, PROMPT, REJECTED, TEXT, TURNS
from tunedock.errors import DataError
from tunedock.recipe.schema import Source

REQUIRED = tuple(dict.fromkeys((*TURNS, "instruction", *PROMPT, *COMPLETION, *CHOSEN, *REJECTED, *LABEL, *TEXT)))
"""Names of columns that some format cannot do without."""

OPTIONAL = ("role", "content", "reasoning", "system", "tools", "history", MARGIN, "input")
"""Keys of turns, and columns that only some rows may have: the first rows need not show them."""


def check_columns(source: Source, rows: Sequence[Mapping[str, Any]]) -> None:
    """Raises DataError when `columns` has a name no format knows, or names a column that none of the first rows has."""
    for ours, theirs in source.columns.items():
        if ours not in REQUIRED and ours not in OPTIONAL:
            near = difflib.get_close_matches(ours, (*REQUIRED, *OPTIONAL), n=1)
            raise DataError(
                f"`columns: {{{ours}: {theirs}}}`: no format has a `{ours}`",
                where=source.path,
                hint=f"did you mean `{near[0]}`?" if near else f"known are {', '.join((*REQUIRED, *OPTIONAL[:-1]))}",
            )
        if ours not in OPTIONAL and rows and not any(theirs in row for row in rows):
            seen = dict.fromkeys(str(key) for row in rows for key in row)
            near = difflib.get_close_matches(theirs, seen, n=1)
            raise DataError(
                f"`columns: {{{ours}: {theirs}}}`: none of the first {len(rows)} row(s) has a column `{theirs}`",
                where=source.path,
                hint=(f"did you mean `{near[0]}`? " if near else "") + f"the columns are {', '.join(list(seen)[:30])}",
            )
