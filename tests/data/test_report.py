from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunedock.data.account import Account
from tunedock.data.report import histogram, length_statistics, write_report
from tunedock.errors import DiskError

LENGTHS = st.lists(st.integers(0, 200_000), min_size=1, max_size=200)


@given(LENGTHS)
def test_histogram_counts_as_numpy_does(lengths: list[int]) -> None:
    made = histogram(lengths)
    edges, counts = made["edges"], made["counts"]
    assert len(edges) == len(counts) + 1
    assert edges[0] <= min(lengths) and max(lengths) < edges[-1]
    assert counts == np.histogram(lengths, edges)[0].tolist()
    assert counts[0] and counts[-1]


@given(LENGTHS)
def test_bins_are_few_and_round(lengths: list[int]) -> None:
    edges = histogram(lengths)["edges"]
    (width,) = {after - before for before, after in pairwise(edges)}
    assert str(width)[0] in "125" and set(str(width)[1:]) <= {"0"}
    assert len(edges) - 1 <= 13
    assert width == 1 or len(edges) - 1 >= 4 or max(lengths) - min(lengths) < 2 * width


def test_no_lengths() -> None:
    assert histogram([]) == {"edges": [], "counts": []}
    assert length_statistics([]) == {"min": None, "median": None, "p95": None, "max": None}


def test_length_statistics() -> None:
    assert length_statistics(list(range(1, 101))) == {"min": 1, "median": 50.5, "p95": 95, "max": 100}
    assert length_statistics([7]) == {"min": 7, "median": 7.0, "p95": 7, "max": 7}


def result_of(account: Account, lengths: list[int]) -> dict[str, Any]:
    return {
        "account": account.to_json(),
        "splits": {"train": {"samples": len(lengths), "tokens": sum(lengths), "trained_tokens": 30}},
        "histogram": histogram(lengths),
        "lengths": length_statistics(lengths),
        "trained_share": 30 / max(sum(lengths), 1),
        "empty_answers": account.reasons.get("empty_answer", 0),
        "duplicates": account.duplicates,
        "no_stop": account.no_stop,
        "report": "somewhere",
    }


@pytest.fixture
def account() -> Account:
    account = Account(read=1010, kept=1000, samples=1000, duplicates=4, no_stop=2, formats={"a_b|c.jsonl": "alpaca"})
    for number in range(9):
        account.drop(f"客服.jsonl:{number}", "empty_answer", "`output` says\n| <b>nothing</b>")
    account.drop("x.jsonl:1", "over_length", "broken \ud800 text")
    account.cut("x.jsonl:2", 17)
    return account


def test_every_dropped_and_cut_row_is_named(tmp_path: Path, account: Account) -> None:
    write_report(tmp_path / "new" / "report", result_of(account, [10, 20, 30]))
    dropped = [json.loads(line) for line in (tmp_path / "new/report/dropped.jsonl").read_text("utf-8").splitlines()]
    assert [row["row_id"] for row in dropped] == [drop.row_id for drop in account.drops]
    assert dropped[0] == {
        "row_id": "客服.jsonl:0",
        "reason": "empty_answer",
        "detail": "`output` says\n| <b>nothing</b>",
    }
    cut = (tmp_path / "new/report/cut.jsonl").read_text("utf-8")
    assert json.loads(cut) == {"row_id": "x.jsonl:2", "tokens": 17}


def test_report_json_holds_the_figures(tmp_path: Path, account: Account) -> None:
    result = result_of(account, [10, 20, 30])
    write_report(tmp_path, result)
    written = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert "drops" not in written["account"] and "cuts" not in written["account"]
    assert written["account"]["reasons"] == {"empty_answer": 9, "over_length": 1}
    assert {key: value for key, value in written.items() if key != "account"} == {
        key: value for key, value in result.items() if key != "account"
    }


def test_report_md_is_readable_and_keeps_its_tables(tmp_path: Path, account: Account) -> None:
    path = write_report(tmp_path, result_of(account, [10] * 40 + [95] * 20))
    text = path.read_text("utf-8")
    lines = text.splitlines()
    assert "| read | 1,010 |" in lines
    reason = next(line for line in lines if line.startswith("| empty_answer"))
    assert "客服.jsonl:4" in reason and "客服.jsonl:5" not in reason and reason.endswith("... |")
    assert reason.count("|") - reason.count("\\|") == 5
    assert "<b>" not in text.replace("\\<b\\>", "")
    assert "| a\\_b\\|c.jsonl | alpaca |" in lines
    bars = {line.split()[0]: line.count("#") for line in lines if " to " in line}
    assert bars["10"] == 2 * bars["90"] == 40


def test_a_report_of_clean_data(tmp_path: Path) -> None:
    text = write_report(tmp_path, result_of(Account(read=1, kept=1, samples=1), [5])).read_text("utf-8")
    assert "Dropped" not in text
    assert (tmp_path / "dropped.jsonl").read_text("utf-8") == ""


def test_a_report_of_nothing_kept(tmp_path: Path) -> None:
    account = Account(read=1)
    account.drop("a:1", "empty_answer", "nothing")
    assert "| kept | 0 |" in write_report(tmp_path, result_of(account, [])).read_text("utf-8")


def test_a_place_that_cannot_be_written(tmp_path: Path, account: Account) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="folder cannot be made"):
        write_report(tmp_path / "file", result_of(account, [1]))
