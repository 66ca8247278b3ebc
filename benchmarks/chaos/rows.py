"""Faults of rows: a data file that changes while the run is down, rows that give no numbers."""

from __future__ import annotations

import subprocess
import sys
from itertools import cycle, islice
from pathlib import Path

from benchmarks.chaos import project
from benchmarks.chaos.injection import Outcome, Trial, Unexpected, expect, still_at_work
from benchmarks.chaos.life import begin, fingerprint, lost_steps, told
from benchmarks.chaos.project import Shape
from benchmarks.peers import ROOT

# -- data --------------------------------------------------------------------------------------------------------------


def a_row_more(content: bytes) -> bytes:
    return content + content.splitlines(keepends=True)[0]


def a_row_less(content: bytes) -> bytes:
    return b"".join(content.splitlines(keepends=True)[1:])


def another_letter(content: bytes) -> bytes:
    """As long as before. Of the text, not of the JSON around it."""
    at = content.index(b'"content": "') + len(b'"content": "')
    return content[:at] + (b"x" if content[at : at + 1] != b"x" else b"y") + content[at + 1 :]


CHANGES = (a_row_more, another_letter, a_row_less)


def changed_data(trial: Trial) -> Outcome:
    """The data file is another one when the run is gone on with: refused; put back, it goes on."""
    shape = Shape(steps=6 * trial.times + 12)
    wanted = trial.undisturbed(shape)
    run = trial.disturbed(shape)
    data = run.path.parent / "rows.jsonl"
    before = data.read_bytes()
    for turn, change in enumerate(islice(cycle(CHANGES), trial.times)):
        life = begin(run, resume=turn > 0)
        still_at_work(life, trial.draw.randint(2, 4))
        life.kill()
        data.write_bytes(change(before))
        expect(begin(run, resume=True), 5)
        error = run.state().error or {}
        if str(data) not in str(error.get("where")):
            raise Unexpected(f"the refusal does not name the file: {error}")
        data.write_bytes(before)
    kinds = "a row more, another letter, a row less"
    return trial.finished(run, wanted, f"{kinds}: refused with exit code 5, naming the file; put back, it goes on")


# -- numbers -----------------------------------------------------------------------------------------------------------

BAD_ROWS = (7, 61)
"""Of 80, from 0."""


def no_numbers(trial: Trial, policy: str) -> Outcome:
    """A token whose embedding is infinite stands in two rows; the run is killed twice on its way past them."""
    model = trial.folder / "model"
    make = [sys.executable, "-m", "benchmarks.chaos.poison", str(model)]
    subprocess.run(make, check=True, cwd=ROOT)
    shape = Shape(more=f"on_divergence: {policy}", model=model)
    for name in ("undisturbed", "disturbed"):
        _poisoned_rows(trial.folder / name / "rows.jsonl")
    wanted = trial.undisturbed(shape)
    run = trial.disturbed(shape)
    for turn in range(2):
        life = begin(run, resume=turn > 0)
        still_at_work(life, 7)
        life.kill()
    expect(begin(run, resume=True), 0)
    warnings = [event for event in told(run) if event["kind"] == "warning" and "is nan at step" in event["message"]]
    if not warnings or not all("rows.jsonl:" in str(event["where"]) for event in warnings):
        raise Unexpected(f"the rows are not named: {warnings}")
    places = sorted({Path(event["where"].removeprefix("row ")).name for event in warnings})
    note = f"named: {', '.join(places)}"
    return Outcome(trial.fault, len(warnings), lost_steps(run), fingerprint(run) == wanted, note)


def _poisoned_rows(path: Path) -> None:
    """The demo's rows, with the word in two of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (project.DEMO / "triage.jsonl").open(encoding="utf-8") as file:
        lines = list(islice(file, project.ROWS))
    for at in BAD_ROWS:
        lines[at] = lines[at].replace('"role": "user", "content": "', '"role": "user", "content": "<|poison|> ', 1)
    path.write_text("".join(lines), encoding="utf-8")
