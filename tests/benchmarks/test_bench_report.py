"""Ratios against the targets, tables, and the page they go into."""

from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks.protocol import Job, Measured, Step
from benchmarks.report import BEGIN, END, PAGE, into_page, markdown, table
from benchmarks.results import Failure, Machine, Peak, Preparing, Report, StartUp
from benchmarks.run import keep_like_ones
from benchmarks.stats import Summary
from benchmarks.targets import verdicts

MACHINE = Machine("Some CPU (R) 9000", 2, 16, "2.13.0", 2, True)


def summary(side: str, variant: str, rate: float, memory: float) -> Summary:
    return Summary(side, variant, "sft", "tiny", 3, rate, rate * 0.9, rate * 1.1, memory, 4.0, 9.0, 9.0)


PEERS = [
    summary("trl", "default", 100, 1000),
    summary("trl", "best", 300, 800),
    summary("llamafactory", "default", 150, 600),
    summary("llamafactory", "best", 400, 400),
]


def test_best_is_the_best_of_any_peer_and_default_the_fastest_default():
    found = {v.what: v for v in verdicts([summary("tunedock", "default", 1000, 200), *PEERS])}
    best = found["sft tiny: tokens/s against the best (llamafactory best)"]
    assert (best.ratio, best.target, best.met) == (pytest.approx(2.5), 2.5, True)
    assert found["sft tiny: tokens/s against the default (llamafactory default)"].ratio == pytest.approx(1000 / 150)
    assert found["sft tiny: peak memory against the fastest (llamafactory best)"].met
    frugal = found["sft tiny: peak memory against the most frugal default (llamafactory default)"]
    assert frugal.met and frugal.ratio == pytest.approx(200 / 600)


def test_a_miss_is_a_miss():
    found = verdicts([summary("tunedock", "default", 999, 401), *PEERS])
    assert [v.met for v in found] == [False, True, False, False, False]


def test_nothing_is_judged_without_a_peer_or_without_us():
    assert verdicts([summary("tunedock", "default", 1000, 200)]) == []
    assert verdicts(PEERS) == []


def test_a_table_has_its_figures_to_the_right():
    assert table(["", "rows/s"], [["a", "1"]]) == "|  | rows/s |\n| --- | ---: |\n| a | 1 |"


def run(side: str, variant: str, seconds: float) -> Measured:
    steps = tuple(Step(seconds, 100, 30, 9.0) for _ in range(4))
    return Measured(side, variant, "sft", "tiny", steps, 5.0, 1.0, 16, 0.0, 900, 400, True)


def report() -> Report:
    return Report(
        MACHINE,
        "20260101",
        "0.1.0",
        {"repeats": 1},
        runs=[run("tunedock", "default", 0.1), run("trl", "default", 1.0)],
        preparing=Preparing(400, 2, {"tunedock": [8000.0], "llamafactory": [900.0]}),
        start_up=StartUp([2.0], {"tunedock": [2.4], "trl default": [6.0]}),
        peak=Peak(1e12, (4096, 4096, 4096), [4e11]),
    )


def test_the_tables_hold_every_part_and_its_verdict():
    said = markdown(report())
    for line in (
        "| **tunedock** | 1,000 | 1,000 to 1,000 | 1 | 1.00x |",
        "| trl default | 100 | 100 to 100 | 1 | 10.00x |",
        "| preparing, rows/s against llamafactory | 8.89 | at least 8 | met |",
        "| command to first step against the bare import | 1.20 | at most 1.25 | met |",
        "| share of the bf16 matmul peak, SFT small | 0.40 | at least 0.5 | missed |",
        "Every side trained on the same tokens",
    ):
        assert line in said


def test_failures_and_disagreements_take_the_place_of_the_assurance():
    broken = report()
    broken.disagreements.append("tiny sft trl default: first loss 1, not 2")
    broken.failures.append(Failure("tiny dpo trl best", "Traceback\nMemoryError: no memory\nhint: buy some"))
    said = markdown(broken)
    assert "- tiny sft trl default: first loss 1, not 2" in said
    assert "- tiny dpo trl best failed: MemoryError: no memory" in said
    assert "Every side trained on the same tokens" not in said


def test_a_report_is_read_as_it_was_written(tmp_path: Path):
    path = report().write(tmp_path)
    assert path.name == "some-cpu-r-9000-2-cores-20260101.json"
    assert asdict(Report.read(path)) == asdict(report())


def test_tables_go_between_the_marks_and_nowhere_else():
    page = f"# Title\n{BEGIN}\nold\n{END}\nafter\n"
    assert into_page(page, "new\n") == f"# Title\n{BEGIN}\n\nnew\n\n{END}\nafter\n"
    with pytest.raises(ValueError, match="has no"):
        into_page("# Title\n", "new")


def test_the_page_of_the_documentation_has_its_marks():
    assert "new" in into_page(PAGE.read_text(encoding="utf-8"), "new\n")


def test_runs_of_more_rows_do_not_mix_with_what_was_measured_before():
    before = report()
    keep_like_ones(before, [Job("trl", "default", "dpo", "tiny", "", "", "", steps=9)])
    assert len(before.runs) == 2
    keep_like_ones(before, [Job("trl", "default", "sft", "tiny", "", "", "", steps=4)])
    assert len(before.runs) == 2
    keep_like_ones(before, [Job("trl", "default", "sft", "tiny", "", "", "", steps=5)])
    assert before.runs == []
