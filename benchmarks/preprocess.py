"""Rows a second of preparing chats: reading, rendering, tokenising, masking. Ours on all cores, peers with as many processes.

    python -m benchmarks.preprocess [--rows 20000] [--repeats 3]

Each repeat is a run of one optimizer step with an empty cache, in which the side itself prepares the rows.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace

from benchmarks import data, models
from benchmarks.drive import RunFailed, run
from benchmarks.protocol import Job
from benchmarks.results import Failure, Preparing
from benchmarks.sides import OURS

SIDES = (OURS, "llamafactory", "trl", "trainer")
SEED = 42


def measure(
    rows: int, repeats: int, failures: list[Failure], tell: Callable[[str], None], *, sides: tuple[str, ...] = SIDES
) -> Preparing:
    """Interleaved: every side once, then again. A side that fails is left out and told in `failures`."""
    model = models.ensure("tiny")
    folder = data.ensure("sft", rows, data.tokenizer_of(model), seed=SEED)
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    job = Job("", "default", "sft", "tiny", str(model), str(folder), "", steps=-(-rows // 4), limit_steps=1, seed=SEED)
    found: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(repeats):
        for side in sides:
            try:
                measured = run(replace(job, side=side, workers=None if side == OURS else workers))
            except RunFailed as failure:
                failures.append(Failure(f"preparing with {side}", str(failure)))
                continue
            found[side].append(measured.rows / measured.preprocessing_s)
            tell(f"preparing {side}: {found[side][-1]:,.0f} rows/s")
    return Preparing(rows, workers, {side: rates for side, rates in found.items() if rates})


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.preprocess")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    failures: list[Failure] = []
    found = measure(options.rows, options.repeats, failures, lambda line: print(line, file=sys.stderr, flush=True))
    for side, rates in found.rows_per_second.items():
        print(f"{side}: {statistics.median(rates):,.0f} rows/s")
    for failure in failures:
        print(f"{failure.what} failed: {failure.why}", file=sys.stderr)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
