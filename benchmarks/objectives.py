"""What each objective makes of the demo's model: the commands anyone can type, and the table of docs/objectives.md.

    python -m benchmarks.objectives                 all of them: about ten minutes on two cores
    python -m benchmarks.objectives --only dpo,kto  these anew; the others' rows stay as they were measured
    python -m benchmarks.objectives --table         the table anew from what was measured

An objective is two commands on one of `recipes/`: `tunedock train`, then `tunedock eval` on the rows held out for the test.
Figures are those of `eval/metrics.json`, of the base and of the tuned model. Where an objective says nothing of a base (`dpo` and
`kto` measure a change against it, a reward model's score layer is new), the start is a margin of 0, and half ranked right by
chance. Times are those of the whole commands.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers import ROOT
from benchmarks.report import into_page
from benchmarks.results import RESULTS, Machine, this_machine
from tunedock.events import EventReader

PAGE = ROOT / "docs" / "objectives.md"
TIMEOUT_S = 1800.0


@dataclass(frozen=True, slots=True)
class Figure:
    """One of `eval/metrics.json`."""

    key: str
    what: str
    start: float | None = None
    """By definition or by chance, where the base has no such figure."""
    share: bool = False


LOSS = Figure("loss", "loss")
CHANCE = 0.5
REWARD = Figure("reward", "reward")


@dataclass(frozen=True, slots=True)
class Case:
    objective: str
    recipe: str
    """A file of `recipes/`."""
    figures: tuple[Figure, ...]
    test: str
    """The file under `tests` that holds the loss to an independent reference."""

    def train(self, run: str) -> list[str]:
        return ["train", f"recipes/{self.recipe}", f"train.output_dir={run}"]

    def eval(self, run: str) -> list[str]:
        return ["eval", run]


def preferred(margin: str, start: float | None) -> tuple[Figure, Figure]:
    return Figure("rewards/accuracies", "ranked right", CHANCE if start is not None else None, share=True), Figure(
        margin, "margin", start
    )


CASES = (
    Case("sft", "sft-lora.yaml", (LOSS, Figure("rougeL", "ROUGE-L")), "train/test_exactness.py"),
    Case("pretrain", "pretrain-continue.yaml", (LOSS, Figure("perplexity", "perplexity")), "train/test_exactness.py"),
    Case("dpo", "dpo-lora.yaml", preferred("rewards/margins", 0.0), "objective/test_dpo_losses.py"),
    Case("orpo", "orpo-lora.yaml", preferred("log_odds_chosen", None), "objective/test_orpo.py"),
    Case("simpo", "simpo-lora.yaml", preferred("rewards/margins", None), "objective/test_simpo.py"),
    Case("kto", "kto-lora.yaml", (Figure("rewards/margins", "margin", 0.0),), "objective/test_kto.py"),
    Case(
        "reward",
        "reward-lora.yaml",
        (Figure("accuracy", "ranked right", CHANCE, share=True),),
        "objective/test_reward.py",
    ),
    Case("ppo", "ppo-lora.yaml", (REWARD,), "objective/test_ppo.py"),
    Case("grpo", "grpo-lora.yaml", (REWARD,), "objective/test_grpo.py"),
    Case("rloo", "rloo-lora.yaml", (REWARD,), "objective/test_rloo.py"),
)


@dataclass(frozen=True, slots=True)
class Found:
    """What came of a case. Figures in the order of the case's."""

    steps: int
    rows: int
    """Held-out rows of the figures."""
    train_s: float
    eval_s: float
    cpu_s: float
    """Of both commands, over all cores: what other work on the machine changes least."""
    start: tuple[float, ...]
    end: tuple[float, ...]

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Found:
        return cls(**{**value, "start": tuple(value["start"]), "end": tuple(value["end"])})


def figures_of(case: Case, metrics: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(start, end) of the case's figures. Raises KeyError where the evaluation has no such figure."""
    base = metrics.get("base") or {}
    start = tuple(base[of.key] if of.start is None else of.start for of in case.figures)
    return start, tuple(metrics["tuned"][of.key] for of in case.figures)


def measure(case: Case, folder: Path) -> Found:
    """Runs both commands. Raises SubprocessError, its output shown, where one fails or takes too long."""
    run = folder / case.objective
    before = os.times()
    train_s = timed(case.train(str(run)))
    eval_s = timed(case.eval(str(run)))
    after = os.times()
    cpu_s = after.children_user + after.children_system - before.children_user - before.children_system
    metrics = json.loads((run / "eval" / "metrics.json").read_text(encoding="utf-8"))
    steps = max(event["step"] for event in EventReader(run / "events.jsonl").new() if event["kind"] == "metrics")
    start, end = figures_of(case, metrics)
    return Found(steps, metrics["samples"], train_s, eval_s, cpu_s, start, end)


def timed(arguments: Sequence[str]) -> float:
    """Seconds of a tunedock command in the project's folder."""
    print(f"$ tunedock {shlex.join(arguments)}", flush=True)
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "tunedock", *arguments], cwd=ROOT, check=True, timeout=TIMEOUT_S)
    return time.monotonic() - began


@dataclass(slots=True)
class Report:
    machine: Machine
    date: str
    found: dict[str, Found]
    """By objective."""

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Report:
        value = json.loads(path.read_text(encoding="utf-8"))
        found = {name: Found.from_json(one) for name, one in value["found"].items()}
        return cls(Machine(**value["machine"]), value["date"], found)


def measure_all(cases: Sequence[Case], report: Report, path: Path) -> list[str]:
    """Adds what is found to the report, and writes it after each. Returns the objectives whose commands failed."""
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            try:
                report.found[case.objective] = measure(case, Path(folder))
            except subprocess.SubprocessError as error:
                print(error, file=sys.stderr)
                failed.append(case.objective)
            else:
                report.write(path)
    return failed


HEAD = ("objective", "command", "steps", "time", "CPU time", "held out", "start", "end", "reference test")


def markdown(report: Report) -> str:
    """The table, in the order of the cases, and what it was measured on."""
    lines: list[tuple[str, ...]] = [HEAD, ("---", "---", "---:", "---:", "---:", "---", "---:", "---:", "---")]
    lines += [_row(case, report.found[case.objective]) for case in CASES if case.objective in report.found]
    about = report.machine
    measured = (
        f"Measured on {report.date}: {about.cpu}, {about.cores} cores that other work was loading too, torch {about.torch}. "
        "Time: `tunedock train`, then `tunedock eval`, from command to prompt under that load; CPU time: both, over all cores. "
        "`dpo`, `kto` and `reward` say nothing of the base: their start is a margin of 0, and half ranked right by chance."
    )
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + f"\n\n{measured}\n"


def _row(case: Case, found: Found) -> tuple[str, ...]:
    start, end = (
        "<br>".join(shown(of, value) for of, value in zip(case.figures, values, strict=True))
        for values in (found.start, found.end)
    )
    what = "<br>".join(of.what for of in case.figures)
    test = Path(case.test)
    return (
        f"[{case.objective}](#{case.objective})",
        f"`tunedock train recipes/{case.recipe}`",
        str(found.steps),
        f"{found.train_s:.0f} s + {found.eval_s:.0f} s",
        f"{found.cpu_s:.0f} s",
        f"{what} ({found.rows} rows)",
        start,
        end,
        f"[{test.stem}](../tests/{test.as_posix()})",
    )


def shown(of: Figure, value: float) -> str:
    return f"{value:.0%}" if of.share else f"{value:.3g}" if abs(value) >= 100 else f"{value:.2f}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.objectives")
    names = [case.objective for case in CASES]
    parser.add_argument("--only", type=lambda text: text.split(","), default=names, help=f"of {', '.join(names)}")
    parser.add_argument("--table", action="store_true", help="write the table of what was measured before")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.only) - set(names)):
        parser.error(f"no such objective: {', '.join(unknown)}")
    machine = this_machine()
    path = RESULTS / f"{machine.slug}-objectives.json"
    before = Report.read(path) if path.exists() else None
    failed: list[str] = []
    if arguments.table:
        if before is None:
            parser.error(f"nothing was measured: there is no {path.name}")
        report = before
    else:
        report = Report(machine, datetime.date.today().isoformat(), dict(before.found) if before else {})
        failed += measure_all([case for case in CASES if case.objective in arguments.only], report, path)
    PAGE.write_text(into_page(PAGE.read_text(encoding="utf-8"), markdown(report)), encoding="utf-8")
    if failed:
        print(f"failed, and in the table as measured before or not at all: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
