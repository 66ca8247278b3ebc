"""A project with a chain on the demo's data: a LoRA, whole weights from it by DPO, an evaluation, an export."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

DEMO = Path(__file__).parents[2] / "examples" / "demo"

CHAIN = """\
defaults:
  offline: true
  data: {{max_length: 192, cache_dir: cache, split: {{train: 0.8, validation: 0.0, test: 0.2}}}}
  train: {{batch_size: 4, save_steps: {save}, report_to: none}}
stages:
  - name: sft
    model: {base}
    data: {{train: rows.jsonl}}
    adapter: {{kind: lora, r: 4}}
    train: {{max_steps: {steps}, learning_rate: 1.0e-3}}
  - name: dpo
    model: stage:sft
    objective: dpo
    adapter: full
    data: {{train: pairs.jsonl}}
    train: {{max_steps: {steps}, learning_rate: 1.0e-4}}
  - {{name: scores, eval: sft, options: {{max_samples: 1, max_new_tokens: 4}}}}
  - {{name: model, export: dpo, to: exported}}
"""


def write_project(folder: Path, *, steps: int = 2, save: int = 1) -> Path:
    """Makes it, and returns its chain file."""
    folder.mkdir(parents=True, exist_ok=True)
    for source, name, rows in (("triage", "rows", 24), ("preferences", "pairs", 16)):
        with (DEMO / f"{source}.jsonl").open(encoding="utf-8") as file:
            (folder / f"{name}.jsonl").write_text("".join(islice(file, rows)), encoding="utf-8")
    chain = folder / "chain.yaml"
    chain.write_text(CHAIN.format(base=DEMO / "base", steps=steps, save=save))
    return chain
