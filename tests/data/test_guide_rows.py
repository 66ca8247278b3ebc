"""The guide to one's own data: its rows are read as it says, and the reasons it names are all there are."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tunedock.data import formats, records
from tunedock.data.formats import detect, parse
from tunedock.data.formats_out import FORMATS

GUIDES = [Path(__file__).parents[2] / "docs" / "guides" / name for name in ("your-own-data.md", "your-own-data.zh.md")]


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.name)
def test_the_rows_are_of_the_formats_they_stand_for(guide: Path) -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| `(\{.*\})` \|$", guide.read_text(encoding="utf-8"), re.MULTILINE))
    assert sorted(rows) == sorted(FORMATS)
    for name, text in rows.items():
        row = json.loads(text)
        assert detect([row]) == name
        parse(row, name, {})


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.name)
def test_every_reason_of_reading_is_named(guide: Path) -> None:
    told = guide.read_text(encoding="utf-8")
    for page in (formats, records):
        table = str(page.__doc__).partition("| missing_column" if page is formats else "| problem")[1:]
        reasons = re.findall(r"^\| (\w+_\w+) \|", "".join(table), re.MULTILINE)
        assert len(reasons) >= 4
        assert [reason for reason in reasons if f"`{reason}`" not in told] == []
