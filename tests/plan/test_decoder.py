"""The arithmetic against the real classes of transformers and PEFT, on the meta device: every name, every size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig

from tunedock.errors import ModelError
from tunedock.model.adapter import attach
from tunedock.plan.decoder import _families, decoder
from tunedock.plan.trained import base_growth, targets, trained_size
from tunedock.recipe.adapters import Adapter, Freeze, Full, Lora

SMALL = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

SHAPES: list[tuple[str, dict[str, Any]]] = [
    ("LlamaConfig", {}),
    ("LlamaConfig", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("SmolLM3Config", {}),
    ("GraniteConfig", {}),
    ("MistralConfig", {"head_dim": 32}),
    ("Qwen2Config", {}),
    ("Qwen3Config", {}),
    ("Qwen3Config", {"tie_word_embeddings": True, "head_dim": 16}),
    ("Olmo2Config", {}),
    ("GemmaConfig", {}),
    ("Gemma2Config", {}),
    ("Gemma3TextConfig", {}),
    ("CohereConfig", {}),
    ("Cohere2Config", {}),
    ("GlmConfig", {}),
    ("Glm4Config", {}),
    ("PhiConfig", {}),
    ("Phi3Config", {}),
    ("MixtralConfig", {"num_local_experts": 4}),
    ("Qwen2MoeConfig", {**EXPERTS, "shared_expert_intermediate_size": 48}),
    ("Qwen3MoeConfig", EXPERTS),
    ("Qwen3MoeConfig", {**EXPERTS, "mlp_only_layers": [0], "decoder_sparse_step": 2}),
]


def config_of(name: str, changes: dict[str, Any]) -> PreTrainedConfig:
    return getattr(transformers, name)(**SMALL, **changes)


def on_meta(config: PreTrainedConfig) -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(("name", "changes"), SHAPES)
def test_every_parameter_has_its_name_and_size(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """From the file as transformers writes it, with the values it leaves out."""
    config = config_of(name, changes)
    config.save_pretrained(tmp_path)
    shape = decoder(json.loads((tmp_path / "config.json").read_text()))
    assert shape.known
    assert shape.parameters == {n: p.numel() for n, p in on_meta(config).named_parameters()}
    assert shape.size == sum(shape.parameters.values())


def test_every_family_of_the_table_is_tested() -> None:
    assert set(_families()) == {config_of(name, changes).model_type for name, changes in SHAPES}


@pytest.mark.parametrize(("name", "changes"), SHAPES)
@pytest.mark.parametrize(
    "adapter",
    [
        Lora(r=8, alpha=16),
        Lora(r=2, alpha=4, target_modules=["o_proj", "q_proj", "dense", "qkv_proj", "lm_head"]),
        Lora(r=4, alpha=4, target_modules=r".*layers\.[01]\..*(o_proj|dense)"),
        Full(),
        Freeze(last_n_layers=2, trainable_modules=["norm"]),
        Freeze(first_n_layers=1, layer_modules=["mlp"]),
    ],
    ids=["all-linear", "names", "expression", "full", "freeze", "freeze-first"],
)
def test_what_is_trained_is_what_peft_trains(name: str, changes: dict[str, Any], adapter: Adapter) -> None:
    config = config_of(name, changes)
    if isinstance(adapter, Lora) and config.tie_word_embeddings and "lm_head" in adapter.target_modules:
        pytest.skip("an adapter on a tied head is another matter")
    if name in ("MixtralConfig", "Qwen3MoeConfig") and isinstance(adapter, Lora) and "layers" in adapter.target_modules:
        pytest.skip("PEFT turns an expression into bare names for these, in every layer")
    if changes.get("mlp_only_layers") and adapter == Lora(r=8, alpha=16):
        pytest.skip("PEFT leaves the dense layers of a mixture out of `all-linear`")
    made = attach(on_meta(config), adapter, seed=0)
    assert trained_size(decoder(config.to_dict()), adapter) == sum(
        p.numel() for p in made.parameters() if p.requires_grad
    )


DENSE = [
    (name, changes) for name, changes in SHAPES if name not in ("MixtralConfig", "Qwen3MoeConfig", "Qwen2MoeConfig")
]


@pytest.mark.parametrize(("name", "changes"), DENSE)
@pytest.mark.parametrize(
    "lora",
    [
        Lora(r=4, alpha=8, use_dora=True, exclude_modules=["down_proj", "q_proj"]),
        Lora(r=4, alpha=8, rank_pattern={"o_proj": 2, r"layers\.1\..*_proj": 6, "v_proj": 9}),
        Lora(r=4, alpha=8, target_modules=["q_proj", "qkv_proj", "up_proj"], layers_to_transform=[0, 2]),
        Lora(r=4, alpha=8, exclude_modules=r".*layers\.0\..*", modules_to_save=["norm", "lm_head"]),
        Lora(r=4, alpha=8, modules_to_save=["embed_tokens", "o_proj", "layers.1.mlp"]),
    ],
    ids=["dora", "ranks", "layers", "head", "embedding"],
)
@pytest.mark.parametrize("grows", [0, 3])
def test_what_a_lora_trains_beside_its_pairs(name: str, changes: dict[str, Any], lora: Lora, grows: int) -> None:
    """Whole modules, lengths of DoRA, rows of new tokens: counted as PEFT makes them."""
    config = config_of(name, changes)
    model = on_meta(config)
    shape = decoder(config.to_dict())
    if grows and getattr(model.get_output_embeddings(), "bias", None) is not None:
        pytest.skip("rows are not trained beside a bias")
    if grows:
        model.resize_token_embeddings(shape.vocabulary + grows, mean_resizing=False)
    assert base_growth(shape, grows) == sum(p.numel() for p in model.parameters()) - shape.size
    try:
        made = attach(model, lora, seed=0, new_ids=range(shape.vocabulary, shape.vocabulary + grows))
    except ModelError as error:
        assert "no module has such a name" in error.message
        pytest.skip("this family calls its modules otherwise")
    got = trained_size(shape, lora, new_tokens=grows, grows=grows)
    assert got == sum(p.numel() for p in made.parameters() if p.requires_grad)


def test_a_model_nobody_knows_is_taken_for_the_commonest() -> None:
    config = config_of("LlamaConfig", {}).to_dict()
    strange = decoder({**config, "model_type": "new-and-shiny"})
    assert not strange.known
    assert strange.size == decoder(config).size


def test_the_text_part_of_a_larger_model_counts() -> None:
    config = config_of("Gemma3TextConfig", {}).to_dict()
    assert decoder({"model_type": "gemma3", "text_config": config}) == decoder(config)


@pytest.mark.parametrize("config", [{}, {"model_type": "bert"}, {"model_type": "llama", "hidden_size": "many"}])
def test_a_config_that_says_too_little_is_a_model_error(config: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="how large"):
        decoder(config)


def test_targets_leave_the_head_out() -> None:
    names = {linear.name for linear in targets(decoder(config_of("LlamaConfig", {}).to_dict()), Lora())}
    assert "lm_head" not in names and "model.layers.2.mlp.down_proj" in names
