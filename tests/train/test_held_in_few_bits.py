"""A checkpoint that holds its weights in few bits itself is a base like one the recipe quantises, and what it cannot be is said."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from families import tiny_model, tokenizer
from tunedock import pipeline
from tunedock.errors import DependencyError, ModelError
from tunedock.events import Emitter
from tunedock.export.stage import export
from tunedock.model.quantize import bits_and_bytes
from tunedock.plan.memory import plan_memory
from tunedock.recipe.adapters import Lora
from tunedock.recipe.exporting import Order
from tunedock.run.record import Run
from tunedock.run.stop import StopRequest
from tunedock.train.stage import train

DEMO = Path(__file__).parents[2] / "examples" / "demo" / "triage.jsonl"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`whole` in bfloat16, and `held` in four bits as bitsandbytes writes them."""
    made = tmp_path_factory.mktemp("bases")
    tiny_model("qwen3").to(torch.bfloat16).save_pretrained(made / "whole")
    quantization = bits_and_bytes("nf4", torch.bfloat16)
    held = AutoModelForCausalLM.from_pretrained(
        made / "whole", dtype=torch.bfloat16, quantization_config=quantization, device_map={"": "cpu"}
    )
    held.save_pretrained(made / "held")
    for name in ("whole", "held"):
        tokenizer("qwen3").save_pretrained(made / name)
    return made


def run(base: Path, to: Path, *changes: str) -> tuple[Run, dict[str, Any]]:
    recipe = to.parent / f"{to.name}.yaml"
    recipe.write_text(
        f"model: {base}\ndata: {{train: {DEMO}, cache_dir: {to}-cache}}\nadapter: lora\n"
        f"train: {{output_dir: {to}, "
        "max_steps: 2, logging_steps: 1, batch_size: 4, eval_strategy: 'no', report_to: none, bf16: true}\n"
    )
    resolved = pipeline.resolve_recipe([recipe], ["data.train.0.num_samples=30", *changes])
    made = pipeline.create_run(resolved)
    return made, train(made, resolved.recipe, Emitter.to_file(made.events), resume=False, stop=StopRequest())


def losses(made: Run) -> list[float]:
    events = [json.loads(line) for line in made.events.read_text(encoding="utf-8").splitlines()]
    return [event["values"]["loss"] for event in events if event["kind"] == "metrics" and "loss" in event["values"]]


def test_it_trains_as_the_one_the_recipe_quantises(folder: Path, tmp_path: Path) -> None:
    held, _ = run(folder / "held", tmp_path / "a")
    whole, _ = run(folder / "whole", tmp_path / "b", "quantize=nf4")
    assert losses(held) and losses(held) == pytest.approx(losses(whole), rel=1e-4)
    with pytest.raises(ModelError, match="no whole ones to merge into") as raised:
        export(
            held,
            pipeline.resolve_recipe([tmp_path / "a.yaml"]).recipe,
            Emitter.to_file(held.events),
            order=Order(to=str(tmp_path / "out"), format="hf"),
        )
    assert "--format adapter" in str(raised.value.hint) and not (tmp_path / "out").exists()
    recipe = pipeline.resolve_recipe([tmp_path / "a.yaml"]).recipe
    order = Order(to=str(tmp_path / "adapter"), format="adapter")
    report = export(held, recipe, Emitter(None), order=order)["report"]
    assert report["same_tokens"] == report["tokens"] > 0


@pytest.mark.parametrize(
    ("change", "said"), [("adapter=full", "do not train"), ("quantize=nf4", "not quantised again")]
)
def test_what_it_cannot_be_is_said(folder: Path, tmp_path: Path, change: str, said: str) -> None:
    with pytest.raises(ModelError, match=said) as raised:
        run(folder / "held", tmp_path / "run", change)
    assert "bitsandbytes" in raised.value.message and raised.value.hint


@pytest.mark.skipif(importlib.util.find_spec("optimum") is not None, reason="what reads GPTQ may be installed here")
def test_a_library_that_is_missing_is_named(folder: Path, tmp_path: Path) -> None:
    config = folder / "whole" / "config.json"
    before = config.read_text(encoding="utf-8")
    config.write_text(
        json.dumps(
            {**json.loads(before), "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}
        )
    )
    try:
        with pytest.raises(DependencyError, match="gptq") as raised:
            run(folder / "whole", tmp_path / "run")
    finally:
        config.write_text(before, encoding="utf-8")
    assert "optimum" in raised.value.message and "quantize: nf4" in str(raised.value.hint)


def test_the_plan_counts_its_bits(folder: Path) -> None:
    whole, held = (json.loads((folder / name / "config.json").read_text()) for name in ("whole", "held"))
    lora = Lora(r=16, alpha=32)
    assert plan_memory(held, adapter=lora).parts == plan_memory(whole, adapter=lora, quantize="nf4").parts
    gptq = {**whole, "quantization_config": {"quant_method": "gptq", "bits": 8}}
    assert plan_memory(gptq, adapter=lora).parts == plan_memory(whole, adapter=lora, quantize="int8").parts
