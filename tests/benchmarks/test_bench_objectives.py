"""The table of objectives: a case for each, the figures taken from an evaluation, the page."""

from pathlib import Path
from typing import get_args

import pytest

from benchmarks.objectives import CASES, PAGE, Case, Figure, Found, Report, figures_of, markdown
from benchmarks.peers import ROOT
from benchmarks.report import into_page
from benchmarks.results import RESULTS, Machine
from tunedock import pipeline
from tunedock.recipe.objectives import Kind

MACHINE = Machine("Some CPU (R) 9000", 2, 16, "2.13.0", 2, True)
DPO = next(case for case in CASES if case.objective == "dpo")


def test_every_objective_has_a_case_of_its_own_recipe_and_test():
    assert sorted(case.objective for case in CASES) == sorted(get_args(Kind))
    for case in CASES:
        resolved = pipeline.resolve_recipe([ROOT / "recipes" / case.recipe], [])
        assert resolved.recipe.objective.kind == case.objective
        assert (ROOT / "tests" / case.test).is_file()


def test_where_a_base_has_a_figure_it_is_the_start():
    case = Case(
        "sft", "sft-lora.yaml", (Figure("loss", "loss"), Figure("exact_match", "exact match", share=True)), "t.py"
    )
    metrics = {"base": {"loss": 4.0, "exact_match": 0.0}, "tuned": {"loss": 0.5, "exact_match": 0.9, "rouge1": 1.0}}
    assert figures_of(case, metrics) == ((4.0, 0.0), (0.5, 0.9))
    with pytest.raises(KeyError):
        figures_of(case, {"base": {}, "tuned": metrics["tuned"]})


def test_where_it_has_none_the_definition_or_chance_gives_it():
    metrics = {"base": {"exact_match": 0.0}, "tuned": {"rewards/accuracies": 0.75, "rewards/margins": 1.5}}
    starts = tuple(of.start for of in DPO.figures)
    assert None not in starts
    assert figures_of(DPO, metrics) == (starts, (0.75, 1.5))
    assert figures_of(DPO, {**metrics, "base": None})[0] == starts  # a reward model's evaluation has no base at all


def test_a_row_has_the_command_the_figures_and_the_test():
    found = Found(20, 40, 12.4, 3.6, 20.2, (0.5, 0.0), (0.75, 123.4))
    said = markdown(Report(MACHINE, "2026-01-31", {"dpo": found}))
    rows = [line for line in said.splitlines() if line.startswith("|")]
    assert len(rows) == 3 and len({row.count("|") for row in rows}) == 1
    for part in (
        "`tunedock train recipes/dpo-lora.yaml`",
        "| 20 |",
        "12 s + 4 s | 20 s |",
        "40 rows",
        "75%<br>123",
        "test_dpo",
    ):
        assert part in rows[2]
    assert "2026-01-31" in said and "Some CPU (R) 9000, 2 cores" in said


def test_a_report_comes_back_as_it_was_written(tmp_path: Path):
    report = Report(MACHINE, "2026-01-31", {"dpo": Found(20, 40, 12.4, 3.6, 20.2, (0.5, 0.0), (0.75, 1.5))})
    report.write(tmp_path / "report.json")
    assert Report.read(tmp_path / "report.json") == report


def test_the_page_shows_what_was_measured():
    measured = sorted(RESULTS.glob("*-objectives.json"))
    report = Report.read(measured[-1])
    assert set(report.found) == {case.objective for case in CASES}
    page = PAGE.read_text(encoding="utf-8")
    assert into_page(page, markdown(report)) == page
