"""How near the memory plan comes: the worker's real peak of training runs beside what `tunedock plan` says of them.

    python -m benchmarks.planning [--only "NAME;..."]

Runs differ in architecture, adapter, quantisation, checkpointing, objective and length of rows. Each is a whole run of a few steps
whose rows are full, in a process of its own, by the launcher users have; its peak is the resident memory while it trains. The
kernel's high-water mark, which knows the loading of the model too, stands in `benchmarks/results/planning.json`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import data, models
from benchmarks.memory import high_water_bytes, resident_bytes
from benchmarks.protocol import ObjectiveName
from benchmarks.report import table
from benchmarks.results import RESULTS
from tunedock import pipeline
from tunedock.events import EventReader
from tunedock.launch.job import JobSpec
from tunedock.launch.local import LocalLauncher
from tunedock.launch.process import LocalJob
from tunedock.launch.watch import watch
from tunedock.plan.cards import this_machine
from tunedock.plan.outlook import Need, outlook
from tunedock.plan.shapes import find_shape

SAMPLE_S = 0.01
STEPS = 6
SEED = 42
WIDE = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
}


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    kind: str
    """`model_type` of the architecture."""
    shape: Mapping[str, Any]
    recipe: Mapping[str, Any] = field(default_factory=dict)
    objective: ObjectiveName = "sft"


CASES = (
    Case("qwen3, LoRA", "qwen3", WIDE | {"head_dim": 64}),
    Case("qwen3, LoRA, large vocabulary", "qwen3", WIDE | {"head_dim": 64, "vocab_size": 151_936}),
    Case(
        "qwen3, LoRA, rows of 512",
        "qwen3",
        WIDE | {"head_dim": 64},
        {"train": {"token_budget": 512}, "data": {"max_length": 512, "over_length": "truncate"}},
    ),
    Case("qwen3, LoRA, checkpointing", "qwen3", WIDE | {"head_dim": 64}, {"train": {"gradient_checkpointing": True}}),
    Case("qwen3, all weights", "qwen3", WIDE | {"head_dim": 64}, {"adapter": "full"}),
    Case(
        "qwen3, last two layers", "qwen3", WIDE | {"head_dim": 64}, {"adapter": {"kind": "freeze", "last_n_layers": 2}}
    ),
    Case("qwen3, QLoRA", "qwen3", WIDE | {"head_dim": 64}, {"quantize": "nf4"}),
    Case("llama, LoRA in float32", "llama", WIDE, {"train": {"bf16": False}}),
    Case("gemma3, LoRA", "gemma3_text", WIDE | {"head_dim": 64}),
    Case("phi3, LoRA of rank 64", "phi3", WIDE, {"adapter": {"kind": "lora", "r": 64}}),
    Case("qwen3, DPO", "qwen3", WIDE | {"head_dim": 64}, {"objective": "dpo"}, "dpo"),
    Case("mistral, pretraining", "mistral", WIDE, {"objective": "pretrain", "adapter": "full"}, "sft"),
)


@dataclass(frozen=True, slots=True)
class Measured:
    name: str
    planned: int
    training: int
    """Peak while training."""
    high_water: int
    """Of the whole process."""
    row: int
    parts: Mapping[str, int]

    @property
    def error(self) -> float:
        return self.planned / self.training - 1


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planning")
    parser.add_argument("--only", default="")
    options = parser.parse_args(arguments)
    wanted = [case for case in CASES if not options.only or case.name in options.only.split(";")]
    found = []
    for case in wanted:
        one = measure(case)
        print(f"{one.name}: planned {one.planned / 1e6:,.0f} MB, measured {one.training / 1e6:,.0f} MB ({one.error:+.1%}), "
              f"high water {one.high_water / 1e6:,.0f} MB, row {one.row}", file=sys.stderr, flush=True)  # fmt: skip
        found.append(one)
    print(written(found))
    if not options.only:
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / "planning.json").write_text(
            json.dumps([asdict(one) for one in found], indent=1) + "\n", encoding="utf-8"
        )
    return 0


def written(found: list[Measured]) -> str:
    rows = [
        [one.name, f"{one.row:,}", f"{one.planned / 1e6:,.0f}", f"{one.training / 1e6:,.0f}", f"{one.error:+.1%}"]
        for one in found
    ]
    return table(["", "tokens of a row", "planned, MB", "measured, MB", "planned over measured"], rows)


def measure(case: Case) -> Measured:
    folder = _model(case)
    rows = data.ensure(case.objective, 16 * STEPS, data.tokenizer_of(models.ensure("tiny")), seed=SEED)
    with tempfile.TemporaryDirectory() as work:
        values = _recipe(case, folder, rows, Path(work))
        path = Path(work) / "recipe.yaml"
        path.write_text(json.dumps(values), encoding="utf-8")
        resolved = pipeline.resolve_recipe([path])
        run = pipeline.create_run(resolved)
        job = LocalLauncher().start(JobSpec("train", run.path, {"resume": False}))
        assert isinstance(job, LocalJob)  # noqa: S101 - a training of one process
        peak = _Training(run.events, job.pid)
        try:
            watch(job, lambda event: None)
        finally:
            peak.end()
            job.close()
        largest = max(change["tokens"] for change in json.loads((run.path / "budget.json").read_text(encoding="utf-8")))
        need: Need = outlook(resolved.recipe, find_shape(resolved.recipe.model), this_machine()).need
    return Measured(case.name, need.at(largest), peak.training, peak.high_water, largest, need.parts)


class _Training:
    """Resident memory of a process from the event that training begins to its end."""

    def __init__(self, events: Path, pid: int) -> None:
        self.training = self.high_water = 0
        self._reader, self._pid = EventReader(events), pid
        self._began, self._done = False, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def end(self) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.is_set():
            if not self._began:
                self._began = any(event.get("task") == "training" for event in self._reader.new())
            else:
                self.training = max(self.training, resident_bytes(self._pid))
            self.high_water = max(self.high_water, high_water_bytes(self._pid))
            time.sleep(SAMPLE_S)


def _recipe(case: Case, model: Path, rows: Path, work: Path) -> dict[str, Any]:
    own = dict(case.recipe)
    file = rows / "tunedock.jsonl"
    if own.get("objective") == "pretrain":
        file = _documents(file, work)
    return {
        "model": str(model),
        "data": {
            "train": str(file),
            "split": {"train": 1.0, "validation": 0.0, "test": 0.0},
            "max_length": 1024,
            "cache_dir": str(work / "cache"),
            **own.pop("data", {}),
        },
        **own,
        "train": {
            "output_dir": str(work / "run"), "max_steps": STEPS, "batch_size": 16, "learning_rate": 1e-4, "eval_strategy": "no",
            "save_strategy": "no", "report_to": "none", "token_budget": 2048, **own.get("train", {}),
        },
    }  # fmt: skip


def _documents(file: Path, work: Path) -> Path:
    """The texts of conversations, for pretraining."""
    path = work / "texts.jsonl"
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    texts = ("\n".join(turn["content"] for turn in line["messages"]) for line in lines)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def _model(case: Case) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    name = "-".join([case.kind, *(str(value) for value in case.shape.values())])
    folder = models.MADE / f"planning-{name}"
    if not (folder / "config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(models.ensure("tiny"))
        shape = {"vocab_size": models.VOCABULARY, "max_position_embeddings": 4096, **case.shape}
        ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
        torch.manual_seed(SEED)
        made = AutoModelForCausalLM.from_config(AutoConfig.for_model(case.kind, **shape, **ends), dtype=torch.bfloat16)
        shutil.rmtree(folder, ignore_errors=True)
        tokenizer.save_pretrained(folder)
        made.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
