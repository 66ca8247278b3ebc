"""`make chaos`, with few of each fault: real trainings that are disturbed come to what the undisturbed one does, to the bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.chaos.__main__ import merged, table
from benchmarks.chaos.clock import set_clock
from benchmarks.chaos.faults import FAULTS
from benchmarks.chaos.injection import Outcome

ROOT = Path(__file__).parents[2]


def outcomes(*arguments: str) -> list[Outcome]:
    command = [sys.executable, "-m", "benchmarks.chaos", "--json", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [Outcome(**one) for one in json.loads(done.stdout.splitlines()[-1])]


@pytest.mark.long
@pytest.mark.timeout(1600)
@pytest.mark.parametrize("fault", [name for name in FAULTS if name != "kill"])
def test_a_fault_changes_nothing_of_what_a_run_comes_to(fault: str) -> None:
    (outcome,) = outcomes("--only", fault, "--times", "2")
    if not outcome.injected:
        pytest.skip(outcome.note)
    assert outcome.identical
    assert outcome.injected >= 2


@pytest.mark.long
@pytest.mark.timeout(1600)
def test_killed_at_random_moments_and_while_writing() -> None:
    (outcome,) = outcomes("--only", "kill", "--kills", "5")
    assert outcome.identical
    assert outcome.injected == 5


def test_a_run_that_came_to_something_else_stands_out() -> None:
    same, other, unknown = (Outcome("SIGKILL", 5, 7, identical, "a note") for identical in (True, False, None))
    lines = table([same, other, unknown]).splitlines()
    assert lines[2] == "| SIGKILL | 5 | 7 | yes | a note |"
    assert "**no**" in lines[3] and "| - |" in lines[4]


def test_a_fault_left_out_has_its_row_and_takes_no_others_place() -> None:
    kills, clock = Outcome("SIGKILL", 100, 189, True), Outcome("clock jumps by hours", 3, 1, True)
    missing = Outcome("clock jumps by hours", 0, 0, None, "left out: no libfaketime")
    gone = Outcome("no fault any more", 1, 1, True)
    assert merged([gone, kills], [missing]) == [kills, missing]
    assert merged([clock, kills], [missing]) == [kills, clock]
    assert merged([missing, kills], [clock]) == [kills, clock]
    assert "left out: no libfaketime" in table([missing])


def test_faults_have_names_of_their_own() -> None:
    assert len({fault.name for fault in FAULTS.values()}) == len(FAULTS)


def test_a_clock_is_set_at_once(tmp_path: Path) -> None:
    file = tmp_path / "offset"
    for hours, text in ((3, "+3h\n"), (-5, "-5h\n")):
        set_clock(file, hours)
        assert [path.name for path in tmp_path.iterdir()] == ["offset"]
        assert file.read_text() == text


@pytest.mark.parametrize("name", ["reliability.md", "reliability.zh.md"])
def test_the_page_shows_what_was_found(name: str) -> None:
    (path,) = (ROOT / "benchmarks" / "results").glob("*-chaos.json")
    found = [Outcome(**one) for one in json.loads(path.read_text())["outcomes"]]
    page = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert table(found) in page
    assert all(one.identical is not False for one in found)
