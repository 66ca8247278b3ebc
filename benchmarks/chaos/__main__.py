"""`python -m benchmarks.chaos [--only kill,cut] [--kills 100] [--times 3] [--write]`: a table of faults and what became of them.

Ends with 1 where a run came to something else than the one nobody disturbed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = (
    "1"  # before torch: a fork of a process with a team of threads has the team's locks, not its threads
)

from benchmarks.chaos.faults import FAULTS
from benchmarks.chaos.injection import CannotBe, Outcome, Trial, Unexpected
from benchmarks.chaos.life import import_all
from benchmarks.peers import ROOT
from benchmarks.results import RESULTS

SEED = 11
MARKS = ("<!-- chaos -->", "<!-- /chaos -->")


def table(outcomes: Sequence[Outcome]) -> str:
    """As Markdown."""
    words = {True: "yes", False: "**no**", None: "-"}
    lines = ["| fault | times | steps done again | same to the bit | |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {one.fault} | {one.injected} | {one.lost_steps} | {words[one.identical]} | {one.note} |" for one in outcomes
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(FAULTS), help="faults by name, with commas between them")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument(
        "--times", type=int, default=3, help="how often each other fault is injected, where a run takes it"
    )
    parser.add_argument("--json", action="store_true", help="print the outcomes as JSON")
    parser.add_argument(
        "--write", action="store_true", help="leave the table in benchmarks/results and docs/reliability.md"
    )
    arguments = parser.parse_args()
    import_all()
    outcomes = []
    for name in arguments.only.split(","):
        began = time.monotonic()
        outcomes.append(outcome(name, arguments.kills if name == "kill" else arguments.times))
        print(f"{name}: {outcomes[-1]} in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    if arguments.write:
        write(outcomes)
    print(json.dumps([asdict(one) for one in outcomes]) if arguments.json else table(outcomes))
    return int(any(one.identical is False for one in outcomes))


def outcome(name: str, times: int) -> Outcome:
    """Of one fault. Its runs are kept where they came to something else."""
    fault = FAULTS[name]
    folder = Path(tempfile.mkdtemp(prefix=f"chaos-{name}-"))
    try:
        found = fault.inject(Trial(fault.name, folder, random.Random(SEED), times))
    except CannotBe as why:
        found = Outcome(fault.name, 0, 0, None, f"left out: {why}")
    except (Unexpected, TimeoutError) as why:
        found = Outcome(fault.name, times, 0, False, str(why))
    if found.identical is not False:
        shutil.rmtree(folder, ignore_errors=True)
    return found


def write(outcomes: Sequence[Outcome]) -> None:
    """Into this machine's table, in the place of what it says of the same faults; one left out takes no other's place."""
    from benchmarks.results import this_machine

    machine = this_machine()  # looked at last: from here on this process may compute
    path = RESULTS / f"{machine.slug}-chaos.json"
    before = json.loads(path.read_text(encoding="utf-8"))["outcomes"] if path.is_file() else []
    rows = merged([Outcome(**value) for value in before], outcomes)
    value = {"machine": asdict(machine), "outcomes": [asdict(one) for one in rows]}
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    into_docs(table(rows))


def merged(before: Sequence[Outcome], new: Sequence[Outcome]) -> list[Outcome]:
    """In the order of the faults; what is no fault any more is gone."""
    found = {one.fault: one for one in before}
    for one in new:
        if one.injected or one.fault not in found:
            found[one.fault] = one
    return [found[fault.name] for fault in FAULTS.values() if fault.name in found]


def into_docs(text: str) -> None:
    """Between the marks of docs/reliability.md, in both languages."""
    for name in ("reliability.md", "reliability.zh.md"):
        path = ROOT / "docs" / name
        before, _, rest = path.read_text(encoding="utf-8").partition(MARKS[0])
        path.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{rest.partition(MARKS[1])[2]}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
