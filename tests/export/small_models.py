"""Small models of the families that GGUF is written of, with weights at which every part of them shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import families

NAMES = ("llama3", "llama3.1", "mistral", "qwen2.5", "qwen3", "gemma", "gemma2", "gemma3")
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}


@dataclass(frozen=True)
class Small:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    stop_ids: list[int]


def words(name: str) -> PreTrainedTokenizerBase:
    """Mistral's is of Llama 2's kind, as its first releases had it."""
    same = {"llama3.1": "llama3", "mistral": "phi3", "gemma2": "gemma", "gemma3": "gemma"}
    return families.tokenizer(same.get(name, name))


def config(name: str, **changes: Any) -> PreTrainedConfig:
    if name == "llama3.1":
        return families.small_config("llama3", rope_parameters=LLAMA3_ROPE, **changes)
    if name == "mistral":
        return families.small_config("mistral", **{"vocab_size": _rows("mistral"), **changes})
    if name == "gemma2":
        return families.small_config("gemma", **changes)
    if name not in ("gemma", "gemma3"):
        return families.small_config(name, **changes)
    tokenizer = words(name)
    shape = {
        "vocab_size": _rows(name), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 2048, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    if name == "gemma":
        return GemmaConfig(**{**shape, **changes})
    window = {"num_hidden_layers": 7, "query_pre_attn_scalar": 16, "sliding_window": 64}
    return Gemma3TextConfig(**{**shape, **window, **changes})


def _rows(name: str) -> int:
    return -(-len(words(name)) // 64) * 64


def small(name: str, **changes: Any) -> Small:
    """Fresh weights in float32, norms and biases away from one and zero."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config(name, **changes), dtype=torch.float32).eval()
        for own, parameter in model.named_parameters():
            if "norm" in own or "bias" in own:
                parameter.data += 0.3 * torch.randn_like(parameter)
    ends = model.config.eos_token_id
    return Small(model, words(name), sorted(ends if isinstance(ends, list) else [ends]))
