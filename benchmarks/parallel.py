"""The same few steps by one process and by several, spread each way: the table of docs/guides/many-processes.md.

    python -m benchmarks.parallel            all of them: about a quarter of an hour on two cores
    python -m benchmarks.parallel --only dpo
    python -m benchmarks.parallel --table    the table anew from what was measured

Each run is `tunedock train recipes/OBJECTIVE-lora.yaml` on the demo's model in float32, as anyone would type it. On a machine
without GPUs the processes share its cores, so nothing is gained in time here; what the table shows is that nothing is lost.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers import ROOT
from benchmarks.report import into_page
from benchmarks.results import RESULTS, Machine, this_machine
from tunedock.events import EventReader

PAGES = (ROOT / "docs" / "guides" / "many-processes.md", ROOT / "docs" / "guides" / "many-processes.zh.md")
FILE = RESULTS / "parallel.json"
TIMEOUT_S = 900.0
STEPS = 5

OBJECTIVES = ("sft", "dpo", "ppo")
WAYS = (("ddp", 2), ("ddp", 4), ("fsdp", 2), ("fsdp", 4), ("zero2", 2), ("zero2", 4), ("zero3", 2), ("zero3", 4))


@dataclass(frozen=True, slots=True)
class Measured:
    """One run's losses, step by step."""

    objective: str
    parallel: str
    processes: int
    losses: list[float]
    eval_loss: float | None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(OBJECTIVES), help="objectives, by commas")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    options = parser.parse_args(arguments)
    before = json.loads(FILE.read_text()) if FILE.is_file() else {"runs": []}
    runs = [Measured(**run) for run in before["runs"]]
    machine = Machine(**before["machine"]) if "machine" in before else this_machine()
    if not options.table:
        asked = options.only.split(",")
        machine = this_machine()
        runs = [run for run in runs if run.objective not in asked]
        for objective in asked:
            for parallel, processes in (("alone", 1), *WAYS):
                runs.append(measure(objective, parallel, processes))
                print(runs[-1], flush=True)
        FILE.write_text(
            json.dumps({"machine": asdict(machine), "runs": [asdict(run) for run in runs]}, indent=1) + "\n"
        )
    for page in PAGES:
        page.write_text(into_page(page.read_text(encoding="utf-8"), table(runs) + "\n"), encoding="utf-8")
    return 0


def measure(objective: str, parallel: str, processes: int) -> Measured:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [
            sys.executable, "-m", "tunedock", "train", str(ROOT / "recipes" / f"{objective}-lora.yaml"),
            f"train.output_dir={run}", f"train.max_steps={STEPS}", f"train.save_steps={STEPS}", "train.bf16=false",
            "train.report_to=none", "train.eval_strategy=steps", f"train.eval_steps={STEPS}", "eval.max_samples=16",
            "train.token_budget=1024", f"launch.processes={processes}",
            *([] if parallel == "alone" else [f"parallel={parallel}"]),
        ]  # fmt: skip
        subprocess.run(command, check=True, timeout=TIMEOUT_S, cwd=folder, stdout=subprocess.DEVNULL)
        events = EventReader(run / "events.jsonl").new()
        told: list[dict[str, Any]] = [dict(event["values"]) for event in events if event["kind"] == "metrics"]
    return Measured(
        objective,
        parallel,
        processes,
        [values["loss"] for values in told if "loss" in values],
        next((values["eval_loss"] for values in told if "eval_loss" in values), None),
    )


def table(runs: Sequence[Measured]) -> str:
    """A row a way, a pair of columns an objective: the last loss, and how far any step's is from one process's."""
    objectives = [name for name in OBJECTIVES if any(run.objective == name for run in runs)]
    lines = [
        "| `parallel` | processes | " + " | ".join(f"{name}: last loss | off by at most" for name in objectives) + " |",
        "| --- | ---: | " + " | ".join("---: | ---:" for _ in objectives) + " |",
    ]
    for parallel, processes in (("alone", 1), *WAYS):
        cells = []
        for name in objectives:
            one = _of(runs, name, "alone", 1)
            run = _of(runs, name, parallel, processes)
            if one is None or run is None:
                cells.append("- | -")
                continue
            pairs = [*zip(run.losses, one.losses, strict=True), (run.eval_loss or 0.0, one.eval_loss or 0.0)]
            off = max(abs(a - b) for a, b in pairs)
            cells.append(f"{run.losses[-1]:.6f} | {'' if parallel == 'alone' else f'{off:.1e}'}")
        name = "one process" if parallel == "alone" else f"`{parallel}`"
        lines.append(f"| {name} | {processes} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _of(runs: Sequence[Measured], objective: str, parallel: str, processes: int) -> Measured | None:
    wanted = (objective, parallel, processes)
    return next((run for run in runs if (run.objective, run.parallel, run.processes) == wanted), None)


if __name__ == "__main__":
    sys.exit(main())
