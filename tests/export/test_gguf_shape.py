"""A config as llama.cpp is told of it, and what llama.cpp would compute otherwise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from small_models import LLAMA3_ROPE, config
from transformers import LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tunedock.errors import ModelError
from tunedock.export.gguf.shape import shape_of


def test_keys_of_a_qwen3() -> None:
    keys = shape_of(config("qwen3")).keys
    assert keys == {
        "qwen3.context_length": 2048,
        "qwen3.embedding_length": 64,
        "qwen3.block_count": 2,
        "qwen3.feed_forward_length": 128,
        "qwen3.attention.head_count": 4,
        "qwen3.attention.head_count_kv": 2,
        "qwen3.attention.layer_norm_rms_epsilon": 1e-6,
        "qwen3.attention.key_length": 16,
        "qwen3.attention.value_length": 16,
        "qwen3.rope.dimension_count": 16,
        "qwen3.rope.freq_base": 10000.0,
        "qwen3.vocab_size": config("qwen3").vocab_size,
    }


def test_gemma_2_says_its_caps_and_its_window() -> None:
    keys = shape_of(config("gemma2")).keys
    assert keys["gemma2.attn_logit_softcapping"] == 50.0
    assert keys["gemma2.final_logit_softcapping"] == 30.0
    assert keys["gemma2.attention.sliding_window"] == 64


@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_llama_3_slows_the_frequencies_that_transformers_slows(head_dim: int) -> None:
    plain = LlamaConfig(head_dim=head_dim, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    scaled = LlamaConfig(head_dim=head_dim, rope_parameters=LLAMA3_ROPE, max_position_embeddings=2048)
    wanted, _ = ROPE_INIT_FUNCTIONS["llama3"](scaled, torch.device("cpu"))
    usual = 5e5 ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    factors = shape_of(scaled).rope_factors
    assert factors is not None
    assert shape_of(plain).rope_factors is None
    np.testing.assert_allclose(usual.numpy() / factors, wanted.double().numpy(), rtol=1e-5)
    assert factors.min() == 1.0 and factors.max() == 8.0


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("qwen3", {"hidden_act": "gelu"}, "`hidden_act: gelu`"),
        ("gemma2", {"query_pre_attn_scalar": 32}, "`query_pre_attn_scalar: 32`"),
        ("gemma3", {"layer_types": ["full_attention"] * 7}, "`layer_types`"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "soft caps in a Gemma 3"),
        ("llama3", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "`rope_type: dynamic`"),
        (
            "llama3",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "attention_factor": 1.0,
                                 "original_max_position_embeddings": 512}},
            "for yarn",
        ),
        (
            "llama3",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "`partial_rotary_factor`",
        ),
        (
            "qwen2.5",
            {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1,
             "layer_types": ["full_attention", "sliding_attention"]},
            "layers with a window",
        ),
    ],
)  # fmt: skip
def test_what_llama_cpp_would_compute_otherwise_is_refused(name: str, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError) as caught:
        shape_of(config(name, **changes))
    assert says in str(caught.value)
    assert "--format hf" in str(caught.value.hint)


def test_an_unknown_architecture_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match="`phi3` cannot be written as GGUF") as caught:
        shape_of(Phi3Config())
    assert "qwen3" in str(caught.value.hint)


def test_a_window_that_llama_cpp_does_not_have_is_noted() -> None:
    assert shape_of(config("mistral")).notes == []
    assert "the last 64 tokens" in shape_of(config("mistral", sliding_window=64)).notes[0]


def test_linear_and_yarn_are_said() -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512}
    keys = shape_of(config("qwen3", rope_parameters=yarn)).keys
    assert keys["qwen3.rope.scaling.type"] == "yarn"
    assert keys["qwen3.rope.scaling.original_context_length"] == 512
    linear = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    assert shape_of(config("qwen3", rope_parameters=linear)).keys["qwen3.rope.scaling.factor"] == 2.0
