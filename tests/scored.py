"""Reward models in miniature, and what they should say, computed by plain transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, Gemma3TextConfig, GenerationConfig, PreTrainedModel

from families import small_config, stop_ids, tokenizer
from tunedock.data.sample import Sample

SCORED = ["qwen3", "llama3", "gemma3-text", "mistral"]


def scored_config(family: str, **overrides: Any) -> Any:
    """A config with one label. `gemma3-text` has Gemma's tokenizer, and windows shorter than the samples."""
    if family != "gemma3-text":
        config = small_config(family, **overrides)
    else:
        shape = {k: v for k, v in small_config("gemma").to_dict().items() if k in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings",
        )}  # fmt: skip
        config = Gemma3TextConfig(**{**shape, "head_dim": 16, "sliding_window": 16, **overrides})
    config.num_labels = 1
    return config


def tiny_scorer(family: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A reward model with fresh weights in float32, the same for the same seed, in eval mode; its scores spread over about 1."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = scored_config(family, **overrides)
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        torch.nn.init.normal_(model.score.weight, std=0.125)
    return model.eval()


def save_scorer(family: str, folder: Path, **more: Any) -> Path:
    """A reward model's folder as the hub has it."""
    words = "gemma" if family == "gemma3-text" else family
    tiny_scorer(family, **more).save_pretrained(folder)
    tokenizer(words).save_pretrained(folder)
    GenerationConfig(eos_token_id=sorted(stop_ids(words))).save_pretrained(folder)
    return folder


def plain_score(model: nn.Module, tokens: Sequence[int]) -> Tensor:
    """What transformers' own forward says of one line."""
    ids = torch.as_tensor([int(token) for token in tokens])[None]
    score: Tensor = model(input_ids=ids).logits[0, 0]
    return score


def plain_scores(model: nn.Module, group: Sequence[Sample]) -> Tensor:
    """[S, 2] of pairs, path by path."""
    return torch.stack(
        [torch.stack([plain_score(model, sample.path(leaf)[0]) for leaf in sample.leaves()]) for sample in group]
    )
