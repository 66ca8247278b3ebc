"""Everything `make bench` measures, in one run of one machine.

    python -m benchmarks.run                            all of it; about two hours a repeat-triple on two cores
    python -m benchmarks.run --quick                    a few steps of the tiny model: does every side work?
    python -m benchmarks.run --models small --objectives sft --sides tunedock,llamafactory --repeats 5

Sides are interleaved round by round, each round beginning with another side, so that a busy minute of the machine meets all alike.
A side that fails or runs out of time is told in the report; the others go on.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks import data, models, peak, preprocess, startup
from benchmarks.drive import TIMEOUT_S, RunFailed, python_of, run
from benchmarks.plot import plot
from benchmarks.protocol import Job, ObjectiveName
from benchmarks.report import markdown
from benchmarks.results import RESULTS, Failure, Report, this_machine
from benchmarks.sides import OURS, SIDES
from benchmarks.stats import disagreements, summaries, tokens_per_second

STEPS: dict[tuple[str, ObjectiveName], int] = {
    ("tiny", "sft"): 40,
    ("tiny", "dpo"): 12,
    ("small", "sft"): 8,
    ("small", "dpo"): 4,
}
"""Optimizer steps of four rows: enough for a steady state, few enough that the slowest peer ends within minutes."""
QUICK_STEPS = 4
SEED = 42
PARTS = ("training", "preparing", "startup", "peak")


@dataclass(frozen=True, slots=True)
class Options:
    models: tuple[str, ...]
    objectives: tuple[ObjectiveName, ...]
    sides: tuple[str, ...]
    parts: tuple[str, ...]
    repeats: int
    steps: int | None
    search: bool
    quick: bool
    add: bool
    timeout_s: float

    def steps_of(self, model: str, objective: ObjectiveName) -> int:
        return self.steps or (QUICK_STEPS if self.quick else STEPS[model, objective])


def options_of(arguments: list[str]) -> Options:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run")
    parser.add_argument("--models", type=_names(tuple(models.SHAPES)), default=tuple(models.SHAPES))
    parser.add_argument("--objectives", type=_names(("sft", "dpo")), default=("sft", "dpo"))
    parser.add_argument("--sides", type=_names(tuple(SIDES)), default=tuple(SIDES))
    parser.add_argument("--parts", type=_names(PARTS), default=PARTS, help=f"of {', '.join(PARTS)}")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=_steps, help=f"optimizer steps of each run, {QUICK_STEPS} at least")
    parser.add_argument("--search", action="store_true", help="measure the candidates for a peer's best settings too")
    parser.add_argument("--quick", action="store_true", help="tiny, four steps, once; the figures mean nothing")
    parser.add_argument("--add", action="store_true", help="add to what this machine measured today")
    parser.add_argument("--timeout", type=float, default=TIMEOUT_S, help="seconds a single run may take")
    given = parser.parse_args(arguments)
    return Options(
        models=("tiny",) if given.quick else given.models,
        objectives=given.objectives,
        sides=given.sides,
        parts=given.parts,
        repeats=1 if given.quick else given.repeats,
        steps=given.steps,
        search=given.search,
        quick=given.quick,
        add=given.add,
        timeout_s=given.timeout,
    )


def _steps(text: str) -> int:
    """Raises argparse.ArgumentTypeError below QUICK_STEPS: packed, fewer rows would make a single step, with no steady state."""
    if not text.isdecimal() or int(text) < QUICK_STEPS:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from {QUICK_STEPS}")
    return int(text)


def _names(known: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
        return names

    return parse


def entries(options: Options) -> Iterator[tuple[str, ObjectiveName, str, str]]:
    """One round: model, objective, side and variant, each once."""
    for model_name in options.models:
        for objective in options.objectives:
            for side in options.sides:
                for variant in SIDES[side].variants[objective]:
                    if options.search or not variant.candidate:
                        yield model_name, objective, side, variant.name


def jobs(options: Options) -> Iterator[Job]:
    """The entries as jobs; models and data they need are made."""
    for model_name, objective, side, variant in entries(options):
        model = models.ensure(model_name)
        steps = options.steps_of(model_name, objective)
        folder = data.ensure(objective, 4 * steps, data.tokenizer_of(model), seed=SEED)
        yield Job(side, variant, objective, model_name, str(model), str(folder), "", steps, seed=SEED)


def train_all(options: Options, report: Report) -> None:
    round_ = list(jobs(options))
    failed: set[Job] = set()
    keep_like_ones(report, round_)
    for number in range(options.repeats):
        start = number * len(round_) // options.repeats
        for job in (*round_[start:], *round_[:start]):
            if job in failed:
                continue  # what failed once fails again, and may take its whole time limit to do so
            what = f"{job.model_name} {job.objective} {job.side} {job.variant}"
            try:
                measured = run(job, timeout_s=options.timeout_s)
            except RunFailed as failure:
                failed.add(job)
                report.failures.append(Failure(what, str(failure)))
                _tell(f"{what} failed: {failure}")
                continue
            report.runs.append(measured)
            report.write(RESULTS)  # an hour's figures do not depend on the last run's end
            _tell(f"{number + 1}/{options.repeats} {what}: {tokens_per_second(measured):,.0f} tokens/s")
    report.disagreements = disagreements(report.runs)


def keep_like_ones(report: Report, jobs: Sequence[Job]) -> None:
    """Leaves out of a report that is added to what was measured on more or fewer rows: medians are of like runs."""
    rows = {(job.model_name, job.objective): job.batch_size * job.steps for job in jobs}
    report.runs = [run for run in report.runs if rows.get((run.model_name, run.objective), run.rows) == run.rows]


def main(arguments: list[str]) -> int:
    options = options_of(arguments)
    for side in options.sides:
        python_of(side)  # environments first: a peer that cannot be installed should not be found out after an hour
    report = Report(
        this_machine(),
        datetime.datetime.now(tz=datetime.UTC).strftime("%Y%m%d") + ("-quick" if options.quick else ""),
        importlib.metadata.version("tunedock"),
        {"repeats": options.repeats, "steps": options.steps, "quick": options.quick, "search": options.search},
    )
    RESULTS.mkdir(parents=True, exist_ok=True)
    if options.add and (known := RESULTS / f"{report.name}.json").is_file():
        report = Report.read(known)
    if "training" in options.parts:
        train_all(options, report)
    if "preparing" in options.parts:
        rows = 400 if options.quick else 20_000
        report.preparing = preprocess.measure(rows, options.repeats, report.failures, _tell, sides=options.sides)
    if "startup" in options.parts:
        report.start_up = startup.measure(options.repeats, report.failures, _tell, sides=options.sides)
    if "peak" in options.parts and OURS in options.sides:
        steps = options.steps_of("small", "sft")
        report.peak = peak.measure(steps, options.repeats, report.failures, _tell)
    return _leave(report)


def _leave(report: Report) -> int:
    """Writes the report; 1 when sides did not agree or something failed."""
    path = report.write(RESULTS)
    tables = markdown(report)
    path.with_suffix(".md").write_text(tables, encoding="utf-8")
    plot(summaries(report.runs), path.with_suffix(".png"))
    print(tables)
    return int(bool(report.failures or report.disagreements))


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
