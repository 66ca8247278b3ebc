"""The run that faults are put into: a step takes a few hundredths of a second, and there is all of what must be kept.

A LoRA with dropout (random draws), AdamW (moments and counts), a cosine schedule, validation, the best checkpoint kept and its
weights taken as the result; the token budget pinned, so that rows do not depend on the memory that happens to be free.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from benchmarks.peers import ROOT
from tunedock.run.record import Run

DEMO = ROOT / "examples" / "demo"
ROWS = 80

RECIPE = """\
model: {model}
offline: true
data: {{train: [{{path: {rows}}}], max_length: 192, cache_dir: {cache}, split: {{train: 0.9, validation: 0.1, test: 0}}}}
adapter: {{kind: lora, r: 4, alpha: 8, dropout: {dropout}}}
train:
  max_steps: {steps}
  batch_size: {batch}
  learning_rate: 1.0e-3
  token_budget: {budget}
  save_steps: {save}
  save_total_limit: 2
  eval_strategy: steps
  eval_steps: {evaluate}
  load_best_model_at_end: true
  report_to: none
  output_dir: {run}
  {more}
"""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a fault needs of its run."""

    steps: int = 24
    save: int = 3
    batch: int = 4
    budget: int = 1024
    """Tokens of a row at most."""
    dropout: float = 0.1
    more: str = ""
    """A line more of the `train` section."""
    model: Path = DEMO / "base"


def write(folder: Path, shape: Shape) -> Run:
    """Makes a run in `folder`, ready to be started, and everything it is made of."""
    from tunedock.pipeline.stages import create_run, resolve_recipe

    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "rows.jsonl"
    if not data.exists():
        with (DEMO / "triage.jsonl").open(encoding="utf-8") as file:
            data.write_text("".join(islice(file, ROWS)), encoding="utf-8")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        RECIPE.format(
            model=shape.model,
            rows=data,
            cache=folder / "cache",
            steps=shape.steps,
            save=shape.save,
            batch=shape.batch,
            budget=shape.budget,
            dropout=shape.dropout,
            evaluate=4 * shape.save,
            run=folder / "run",
            more=shape.more,
        ),
        encoding="utf-8",
    )
    return create_run(resolve_recipe([recipe]))
