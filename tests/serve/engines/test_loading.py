"""Engines of runs and of exported folders: what they answer is what the run's model answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from asking import CPU, asked, by_generate, ids, prompts, together
from test_batching import lively

from families import save_tiny, small_config
from tunedock import pipeline
from tunedock.errors import ModelError
from tunedock.events import Emitter
from tunedock.model.policy import Precision
from tunedock.model.session import find_base, tuned_policy
from tunedock.recipe.schema import Recipe
from tunedock.run.record import Run
from tunedock.run.stop import StopRequest
from tunedock.serve.engines.batching import Limits
from tunedock.serve.engines.compute import Alone, Paged
from tunedock.serve.engines.loading import from_folder, from_model, from_run
from tunedock.train.stage import train

LIMITS = Limits(running=4, longest=256, cache_bytes=16 << 20)
FLOAT32 = Precision(torch.float32, torch.float32)
KINDS = {
    "lora": ["adapter.r=4"],
    "dora": ["adapter.r=4", "adapter.use_dora=true"],
    "tokens": ["adapter.r=4", "model.add_tokens=[<hours>]"],
    "full": ["adapter=full"],
}
Made = Callable[[str], tuple[Run, Recipe]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("loading")
    save_tiny("qwen3", place / "base")
    rows = [{"prompt": f"How many hours are in {n} days?", "response": f"There are {24 * n} hours."} for n in range(8)]
    (place / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (place / "recipe.yaml").write_text(
        "model: ./base\ndata: {train: rows.jsonl, max_length: 128, cache_dir: ./cache}\n"
        "train: {max_steps: 3, batch_size: 4, learning_rate: 5.0e-2, bf16: false, eval_strategy: 'no'}\n"
    )
    return place


@pytest.fixture(scope="module")
def made(place: Path) -> Made:
    runs: dict[str, tuple[Run, Recipe]] = {}

    def make(name: str) -> tuple[Run, Recipe]:
        if name not in runs:
            found = pipeline.resolve_recipe(
                [place / "recipe.yaml"], [*KINDS[name], f"train.output_dir={place / 'runs' / name}"]
            )
            run = pipeline.create_run(found)
            train(run, found.recipe, Emitter.to_file(run.events), resume=False, stop=StopRequest())
            runs[name] = (run, found.recipe)
        return runs[name]

    return make


def wanted(run: Run, recipe: Recipe, asks: list[list[int]]) -> list[list[int]]:
    policy = tuned_policy(find_base(recipe), run.model, precision=FLOAT32, device=CPU)
    return [by_generate(policy.model, prompt, 12) for prompt in asks]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_in_one_piece(made: Made, kind: str) -> None:
    run, recipe = made(kind)
    engine = from_run(run, recipe, dtype=torch.float32, device=CPU, limits=LIMITS)
    asks = prompts(600, (20, 7, 33))
    got = together(engine, [asked(prompt, 12) for prompt in asks])
    engine.close()
    assert isinstance(engine._compute, Paged) and engine.adapters() == []
    assert [ids(tokens) for tokens in got] == wanted(run, recipe, asks)


def test_a_runs_adapter_among_others(made: Made, place: Path) -> None:
    run, recipe = made("lora")
    asks = prompts(600, (20, 7))
    others = {"again": str(run.model), "by run": str(run.path)}
    engine = from_run(run, recipe, merge=False, adapters=others, dtype=torch.float32, device=CPU, limits=LIMITS)
    names = ["lora", "again", "by run", None]
    got = together(engine, [asked(prompt, 12, adapter=name) for name in names for prompt in asks])
    engine.close()
    assert engine.adapters() == ["again", "by run", "lora"]
    tuned = wanted(run, recipe, asks)
    assert [ids(tokens) for tokens in got[:6]] == tuned * 3
    base = from_folder(place / "base", dtype=torch.float32, device=CPU, limits=LIMITS)
    plain = [ids(tokens) for tokens in together(base, [asked(prompt, 12) for prompt in asks])]
    base.close()
    assert [ids(tokens) for tokens in got[6:]] == plain and plain != tuned


def test_an_adapter_that_must_be_merged_says_so(made: Made) -> None:
    run, recipe = made("dora")
    with pytest.raises(ModelError, match="use_dora"):
        from_run(run, recipe, merge=False, dtype=torch.float32, device=CPU, limits=LIMITS)


def test_only_safetensors(tmp_path: Path) -> None:
    save_tiny("qwen3", tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(ModelError, match="reading pickle can run code"):
        from_folder(tmp_path / "pickled", device=CPU)


def test_bfloat16_keeps_what_must_not_be_rounded(made: Made) -> None:
    run, recipe = made("lora")
    engine = from_run(run, recipe, dtype=torch.bfloat16, device=CPU, limits=LIMITS)
    model: Any = engine._compute.model
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert isinstance(engine._compute, Paged)
    assert len(together(engine, [asked([1, 2, 3], 5)])[0]) == 5
    engine.close()


def test_no_room_for_keys_and_values() -> None:
    with pytest.raises(ModelError, match="no memory for keys and values: a token takes 512 bytes, and 1,000 are free"):
        from_model(lively("qwen3"), CPU, limits=Limits(cache_bytes=1000))
    engine = from_model(lively("qwen3"), CPU, limits=Limits(cache_bytes=512 * 320))
    assert engine.longest == 320 and "at most 320 tokens: memory" in engine.notes[0]
    engine.close()


def test_positions_that_depend_on_the_length_of_the_whole() -> None:
    """`dynamic` turns keys otherwise beyond the length it was trained with; to there, rows are exact."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    engine = from_model(lively("llama3", rope_parameters=rope, max_position_embeddings=64), CPU, limits=LIMITS)
    assert engine.longest == 64
    model = lively("llama3", rope_parameters=rope, max_position_embeddings=64)
    asks = prompts(600, (40, 7))
    got = together(engine, [asked(prompt, 20) for prompt in asks])
    engine.close()
    assert [ids(tokens) for tokens in got] == [by_generate(model, prompt, 20) for prompt in asks]


def test_positions_that_turn_at_a_length() -> None:
    """`longrope` (Phi-3) has other positions beyond a length: rows on both sides of it, and one that crosses it, side by side."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [1.5 + i for i in range(8)]}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64, **factors}
    changes = {"rope_parameters": rope, "original_max_position_embeddings": 64}
    engine, model = (
        from_model(lively("phi3", **changes), CPU, limits=replace(LIMITS, chunk=32)),
        lively("phi3", **changes),
    )
    assert isinstance(engine._compute, Paged) and engine._compute.turn == 64 and engine.longest == 256
    asks = prompts(600, (50, 7, 100, 64, 63, 65, 1))
    got = together(engine, [asked(prompt, 30) for prompt in asks])
    engine.close()
    assert [ids(tokens) for tokens in got] == [by_generate(model, prompt, 30) for prompt in asks]


def test_a_model_whose_layers_are_not_all_attention() -> None:
    """Linear layers keep a state and no keys: such a model is computed row by row, and right."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "Qwen3NextConfig"):
        pytest.skip("transformers has no Qwen3-Next")
    shape = small_config("qwen3")
    config = transformers.Qwen3NextConfig(
        vocab_size=shape.vocab_size, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16,
        linear_value_head_dim=16, num_experts=0, decoder_sparse_step=1, mlp_only_layers=[0, 1, 2, 3],
    )  # fmt: skip

    def model() -> Any:
        torch.manual_seed(0)
        made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            made.model.norm.weight.add_(9.0)
        return made

    engine = from_model(model(), CPU, limits=LIMITS)
    assert isinstance(engine._compute, Alone) and "one by one" in engine.notes[0]
    asks = prompts(600, (30, 7, 15, 3, 21))
    got = together(engine, [asked(prompt, 10) for prompt in asks])
    engine.close()
    assert [ids(tokens) for tokens in got] == [by_generate(model(), prompt, 10) for prompt in asks]
