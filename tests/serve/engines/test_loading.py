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
from transformers import AutoConfig, AutoModelForCausalLM

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


SMALL = {
    "vocab_size": 600, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
WINDOWS = ["sliding_attention", "full_attention", "full_attention"]
QUICK: dict[str, tuple[type, dict[str, Any]]] = {
    "gemma3_text": (Paged, {"sliding_window": 16, "layer_types": WINDOWS, "query_pre_attn_scalar": 16}),
    "gpt_oss": (Paged, {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16}),
    "mistral": (Paged, {"sliding_window": 16}),
    "qwen3_moe": (Paged, {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
    "gpt2": (Paged, {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}),
    "lfm2": (Alone, {"layer_types": ["conv", "full_attention", "conv"]}),
    "llama4_text": (Alone, {"num_local_experts": 2, "intermediate_size_mlp": 128, "attention_chunk_size": 32}),
}
LONG: dict[str, tuple[type, dict[str, Any]]] = {
    "mixtral": (Paged, {"num_local_experts": 4}),
    "deepseek_v3": (Paged, {
        "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "qk_nope_head_dim": 16, "head_dim": 8,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32,
        "first_k_dense_replace": 1, "num_key_value_heads": 4,
    }),
    "gemma3n_text": (Paged, {
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 600, "laurel_rank": 8, "altup_num_inputs": 2,
        "num_kv_shared_layers": 1, "activation_sparsity_pattern": [0.0] * 3, "layer_types": WINDOWS, "sliding_window": 16,
    }),
    "bloom": (Alone, {"n_layer": 2, "n_head": 4}),
    "cohere2": (Paged, {"sliding_window": 16}),
    "starcoder2": (Paged, {"sliding_window": 16}),
    "exaone4": (Paged, {"sliding_window": 16}),
    **{name: (Paged, {}) for name in ("phi", "glm4", "olmo2", "granite", "gpt_neox", "smollm3", "seed_oss", "ernie4_5", "opt")},
}  # fmt: skip


def any_model(kind: str, settings: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SMALL, **settings})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and not any(part in name for part in ("emb", "wte", "wpe")):
                parameter.mul_(3.0)
            if "sinks" in name:
                parameter.normal_()
    return model


def holds(kind: str, way: type, settings: dict[str, Any]) -> None:
    engine, model = (
        from_model(any_model(kind, settings), CPU, limits=replace(LIMITS, chunk=24)),
        any_model(kind, settings),
    )
    assert type(engine._compute) is way, engine.notes
    asks = prompts(600, (50, 7, 33, 1, 20))
    got = together(engine, [asked(prompt, 14) for prompt in asks])
    engine.close()
    assert [ids(tokens) for tokens in got] == [by_generate(model, prompt, 14) for prompt in asks]


@pytest.mark.parametrize("kind", QUICK)
def test_architectures(kind: str) -> None:
    """Windows by kind of layer, sinks, experts, learned positions; layers that are convolutions, attention in chunks."""
    holds(kind, *QUICK[kind])


@pytest.mark.long
@pytest.mark.parametrize("kind", LONG)
def test_more_architectures(kind: str) -> None:
    holds(kind, *LONG[kind])


@pytest.mark.parametrize("kind", ["mamba", "jamba"])
def test_a_model_that_neither_way_is_right_for_is_refused(kind: str) -> None:
    """Mamba takes what it keeps by another name, and with ours would forget its prompt."""
    with pytest.raises(ModelError, match="cannot be served here") as caught:
        from_model(any_model(kind, {}), CPU, limits=LIMITS)
    assert "--engine vllm" in str(caught.value.hint)


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
