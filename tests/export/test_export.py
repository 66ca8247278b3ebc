"""An export is the run's model, or there is no export: the checks, and exports broken on purpose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from families import save_tiny
from tunedock import pipeline
from tunedock.errors import CheckError, RecipeError, RunError
from tunedock.events import Emitter
from tunedock.export import hf, stage
from tunedock.recipe.exporting import Order
from tunedock.recipe.schema import Recipe
from tunedock.run.record import Run
from tunedock.run.stop import StopRequest
from tunedock.train.stage import train

QUIET = Emitter(None)


def trained(folder: Path, *overrides: str) -> tuple[Run, Recipe]:
    """A run of three steps on a tiny Qwen3 whose files are bfloat16, as real ones are."""
    base = folder / "base"
    if not base.exists():
        save_tiny("qwen3", base)
        weights = load_file(base / "model.safetensors")
        save_file({k: v.bfloat16() for k, v in weights.items()}, base / "model.safetensors", {"format": "pt"})
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    rows = [{"prompt": f"How many hours are in {n} days?", "response": f"There are {24 * n} hours."} for n in range(30)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        "model: ./base\ndata: {train: rows.jsonl, max_length: 128, cache_dir: ./cache}\n"
        "train: {max_steps: 3, batch_size: 8, learning_rate: 1.0e-2, bf16: false}\neval: {max_new_tokens: 8}\n"
    )
    resolved = pipeline.resolve_recipe([recipe], [*overrides, f"train.output_dir={folder / 'run'}"])
    run = pipeline.create_run(resolved)
    train(run, resolved.recipe, QUIET, resume=False, stop=StopRequest())
    return run, resolved.recipe


def export(run: Run, recipe: Recipe, to: Path, **order: Any) -> dict[str, Any]:
    return stage.export(run, recipe, QUIET, order=Order(to=str(to), **order))


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Recipe]:
    return trained(tmp_path_factory.mktemp("lora"), "adapter.r=4")


def test_the_merged_files_are_the_runs_model(lora: tuple[Run, Recipe], tmp_path: Path) -> None:
    run, recipe = lora
    told = export(run, recipe, tmp_path / "out", format="hf")
    checks = told["checks"]
    assert checks["merged_difference"] < 1e-4
    assert checks["file_difference"] < 0.05
    assert 0 < checks["changed_tensors"] < checks["tensors"]
    # Read by plain transformers, as its users will: the type of the base, and answers that end where the run's do.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    facts = json.loads((run.model / "chat.json").read_text())
    assert sorted(model.generation_config.eos_token_id) == sorted(facts["stop_ids"])
    assert tokenizer.chat_template
    card = (tmp_path / "out" / "README.md").read_text()
    assert "merged difference" in card and recipe.objective.kind in card
    assert not list(tmp_path.glob(".out*"))
    # A server is often another user: who may read the config may read the weights.
    modes = {file.name: file.stat().st_mode for folder in (tmp_path / "out", run.model) for file in folder.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]
    assert modes["adapter_model.safetensors"] == modes["adapter_config.json"]


def test_the_adapter_alone_gives_the_same_model_through_peft(lora: tuple[Run, Recipe], tmp_path: Path) -> None:
    from peft import PeftModel

    run, recipe = lora
    export(run, recipe, tmp_path / "hf", format="hf")
    export(run, recipe, tmp_path / "adapter", format="adapter")
    base = AutoModelForCausalLM.from_pretrained(recipe.model.path, dtype=torch.float32)
    with_adapter = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    ids = torch.arange(1, 40)[None]
    with torch.no_grad():
        a, b = with_adapter(ids).logits, merged(ids).logits
    assert float((a - b).abs().max()) < 0.05 * float(a.abs().max())


def test_full_weights_are_exported_and_have_no_adapter(tmp_path: Path) -> None:
    run, recipe = trained(tmp_path, "adapter=full")
    told = export(run, recipe, tmp_path / "out", format="hf")
    assert told["checks"]["changed_tensors"] > 0
    with pytest.raises(RecipeError, match="no adapter"):
        export(run, recipe, tmp_path / "other", format="adapter")
    assert not (tmp_path / "other").exists()


def test_base_weights_in_disguise_are_caught(
    lora: tuple[Run, Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A merge that forgets the adapter."""
    run, recipe = lora
    from peft import PeftModel

    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self: self.unload(), raising=False)
    with pytest.raises(CheckError, match="do not give the logits"):
        export(run, recipe, tmp_path / "out", format="hf")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_an_untrained_adapter_is_caught(tmp_path: Path) -> None:
    run, recipe = trained(tmp_path)
    path = run.model / "adapter_model.safetensors"
    save_file({k: torch.zeros_like(v) if "lora_B" in k else v for k, v in load_file(path).items()}, path)
    with pytest.raises(CheckError, match="base's own"):
        export(run, recipe, tmp_path / "out", format="hf")


def test_files_that_went_wrong_on_the_way_are_caught(
    lora: tuple[Run, Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, recipe = lora
    plain_save = hf.adapters.save

    def swap_two_layers(model: torch.nn.Module, folder: Path, **options: Any) -> None:
        plain_save(model, folder, **options)
        weights = load_file(folder / "model.safetensors")
        a, b = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
        weights[a], weights[b] = weights[b], weights[a]
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(hf.adapters, "save", swap_two_layers)
    with pytest.raises(CheckError, match="written files"):
        export(run, recipe, tmp_path / "out", format="hf")


def test_a_folder_in_use_is_left_alone(lora: tuple[Run, Recipe], tmp_path: Path) -> None:
    run, recipe = lora
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(RunError, match="in use"):
        export(run, recipe, tmp_path, format="hf")
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_run_without_a_result_has_nothing_to_export(lora: tuple[Run, Recipe], tmp_path: Path) -> None:
    _, recipe = lora
    (tmp_path / "run").mkdir()
    with pytest.raises(RunError, match="no result"):
        export(Run(tmp_path / "run"), recipe, tmp_path / "out", format="hf")
