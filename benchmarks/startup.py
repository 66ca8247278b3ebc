"""Seconds from the command to the end of the first optimizer step, beside the bare import of what nobody can do without.

    python -m benchmarks.startup [--repeats 5]

The first step is one of four chats on the tiny model, data prepared anew. A peer is started as its driver, which spares it its own
command line.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from benchmarks import data, models
from benchmarks.drive import RunFailed, run
from benchmarks.imports import BARE, imported
from benchmarks.protocol import Job
from benchmarks.results import Failure, StartUp
from benchmarks.sides import OURS, SIDES

SEED = 42
ROWS = 4


def measure(
    repeats: int, failures: list[Failure], tell: Callable[[str], None], *, sides: Sequence[str] = tuple(SIDES)
) -> StartUp:
    """Interleaved: the import and every side once, then again. The first round fills the disk's cache and is not counted."""
    model = models.ensure("tiny")
    folder = data.ensure("sft", ROWS, data.tokenizer_of(model), seed=SEED)
    job = Job("", "", "sft", "tiny", str(model), str(folder), "", steps=1, seed=SEED)
    bare: list[float] = []
    found: dict[str, list[float]] = {}
    for number in range(repeats + 1):
        started = time.time()
        seconds = imported(BARE).at - started
        if number:
            bare.append(seconds)
        for side in sides:
            for variant in SIDES[side].variants["sft"]:
                if variant.candidate:
                    continue
                name = side if side == OURS else f"{side} {variant.name}"
                try:
                    seconds = run(replace(job, side=side, variant=variant.name)).first_step_s
                except RunFailed as failure:
                    failures.append(Failure(f"start-up of {name}", str(failure)))
                    continue
                if number:
                    found.setdefault(name, []).append(seconds)
                    tell(f"start-up {name}: {seconds:.2f} s")
    return StartUp(bare, found)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup")
    parser.add_argument("--repeats", type=int, default=5)
    failures: list[Failure] = []
    found = measure(
        parser.parse_args(arguments).repeats, failures, lambda line: print(line, file=sys.stderr, flush=True)
    )
    bare = statistics.median(found.bare_import_s)
    print(f"bare import: {bare:.2f} s")
    for name, seconds in found.first_step_s.items():
        print(f"{name}: {statistics.median(seconds):.2f} s, {statistics.median(seconds) / bare:.2f} of the bare import")
    for failure in failures:
        print(f"{failure.what} failed: {failure.why}", file=sys.stderr)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
