"""`make chaos`, with few of each fault: real trainings that are disturbed come to what the undisturbed one does, to the bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.chaos.__main__ import table
from benchmarks.chaos.faults import Outcome, faults

ROOT = Path(__file__).parents[2]
FAULTS = [name for name in faults(kills=1, stops=1) if name != "kill"]


def outcomes(*arguments: str) -> list[Outcome]:
    command = [sys.executable, "-m", "benchmarks.chaos", "--json", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    if "left out: " in done.stderr:
        pytest.skip(done.stderr.partition("left out: ")[2].splitlines()[0])
    return [Outcome(**one) for one in json.loads(done.stdout.splitlines()[-1])]


@pytest.mark.long
@pytest.mark.timeout(1600)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_changes_nothing_of_what_a_run_comes_to(fault: str) -> None:
    (outcome,) = outcomes("--only", fault, "--stops", "2")
    assert outcome.identical and outcome.injected


@pytest.mark.long
@pytest.mark.timeout(1600)
def test_killed_at_random_moments_and_while_writing(tmp_path: Path) -> None:
    (outcome,) = outcomes("--only", "kill", "--kills", "5")
    assert outcome.identical
    assert outcome.injected == 5


def test_a_run_that_came_to_something_else_stands_out() -> None:
    same, other, unknown = (Outcome("SIGKILL", 5, 7, identical, "a note") for identical in (True, False, None))
    lines = table([same, other, unknown]).splitlines()
    assert lines[2] == "| SIGKILL | 5 | 7 | yes | a note |"
    assert "**no**" in lines[3] and "| - |" in lines[4]


@pytest.mark.parametrize("name", ["reliability.md", "reliability.zh.md"])
def test_the_page_shows_what_was_found(name: str) -> None:
    (path,) = (ROOT / "benchmarks" / "results").glob("*-chaos.json")
    found = [Outcome(**one) for one in json.loads(path.read_text())["outcomes"]]
    page = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert table(found) in page
    assert all(one.identical for one in found)
