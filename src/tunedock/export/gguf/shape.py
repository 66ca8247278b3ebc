"""A model's config -> what llama.cpp is told of its shape, as keys of GGUF.

llama.cpp computes a family as its code has it, not as a config says. So a config is also held against what that code does: where it
differs, the file would load and answer otherwise, and is not written. The families are rows of families.json.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedConfig

from tunedock.errors import ModelError

HINT = "export it with `--format hf`"
ACTIVATIONS = {"llama": "silu", "qwen2": "silu", "qwen3": "silu", "gemma": "gelu_pytorch_tanh", "gemma2": "gelu_pytorch_tanh",
               "gemma3": "gelu_pytorch_tanh"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Family:
    """What differs between families, for their tensors and their shape."""

    arch: str
    """llama.cpp's name."""
    rotates_pairs: bool = False
    """RoPE turns neighbours, where transformers turns halves: rows of the query and key projections change places."""
    norm_plus_one: bool = False
    """A norm multiplies by one more than its weight says, and llama.cpp by what the file says."""
    scales_by_head: bool = False
    """Attention is scaled by the head's size, whatever `query_pre_attn_scalar` says."""
    window_period: int | None = None
    """Every so many layers one attends to all, the others within the window."""
    local_rope: float | None = None
    """The base of RoPE in layers with a window."""


@dataclass(frozen=True, slots=True)
class Shape:
    family: Family
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    keys: dict[str, int | float | str]
    """GGUF's keys without `general.` ones, in full (`qwen3.block_count`)."""
    rope_factors: NDArray[np.float32] | None = None
    """[head_dim / 2], by which frequencies are divided (Llama 3's scaling)."""
    notes: list[str] = field(default_factory=list)
    """What llama.cpp does otherwise in ways that need not matter."""


@cache
def families() -> dict[str, Family]:
    """transformers' `model_type` -> family."""
    text = (files("tunedock.export.gguf") / "families.json").read_text(encoding="utf-8")
    return {name: Family(**row) for name, row in json.loads(text).items()}


def family_of(config: PreTrainedConfig) -> Family:
    """Raises ModelError for an architecture there is no row for."""
    found = families().get(config.model_type)
    if found is None:
        raise ModelError(
            f"models of the architecture `{config.model_type}` cannot be written as GGUF here",
            where="--format gguf",
            hint=f"{HINT}; GGUF is written of {', '.join(families())}",
        )
    return found


def shape_of(config: PreTrainedConfig) -> Shape:
    """Raises ModelError for what llama.cpp computes otherwise than the config says."""
    family = family_of(config)
    heads = int(config.num_attention_heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    kv_heads = int(config.num_key_value_heads or heads)
    _refuse_what_differs(config, family, head_dim)
    arch = family.arch
    keys: dict[str, int | float | str] = {
        f"{arch}.context_length": int(config.max_position_embeddings),
        f"{arch}.embedding_length": int(config.hidden_size),
        f"{arch}.block_count": int(config.num_hidden_layers),
        f"{arch}.feed_forward_length": int(config.intermediate_size),
        f"{arch}.attention.head_count": heads,
        f"{arch}.attention.head_count_kv": kv_heads,
        f"{arch}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{arch}.attention.key_length": head_dim,
        f"{arch}.attention.value_length": head_dim,
        f"{arch}.rope.dimension_count": head_dim,
        f"{arch}.vocab_size": int(config.vocab_size),
    }
    notes: list[str] = []
    rope = _rope(config, family)
    keys |= {f"{arch}.{key}": value for key, value in _rope_keys(rope).items()}
    keys |= {f"{arch}.{key}": value for key, value in _window_keys(config, family, notes).items()}
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, name, None) is not None:
            keys[f"{arch}.{name}"] = float(getattr(config, name))
    return Shape(
        family=family,
        layers=int(config.num_hidden_layers),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocabulary=int(config.vocab_size),
        tied=bool(config.tie_word_embeddings),
        keys=keys,
        rope_factors=_llama3_factors(rope, head_dim) if rope.get("rope_type") == "llama3" else None,
        notes=notes,
    )


def _refuse_what_differs(config: PreTrainedConfig, family: Family, head_dim: int) -> None:
    act = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if act != ACTIVATIONS[family.arch]:
        raise _differs(f"`hidden_act: {act}`", f"`{ACTIVATIONS[family.arch]}`")
    scalar = getattr(config, "query_pre_attn_scalar", None)
    if family.scales_by_head and scalar is not None and float(scalar) != float(head_dim):
        by_width = config.hidden_size / config.num_attention_heads
        largest = (family.arch, int(config.num_hidden_layers)) in (("gemma2", 46), ("gemma3", 62))
        if not (largest and float(scalar) == by_width):
            raise _differs(f"`query_pre_attn_scalar: {scalar}`", f"the size of a head, {head_dim}")
    if family.arch == "gemma3" and (config.attn_logit_softcapping or config.final_logit_softcapping):
        raise _differs("soft caps in a Gemma 3", "none")
    if family.arch == "gemma3" and getattr(config, "use_bidirectional_attention", False):
        raise _differs("`use_bidirectional_attention`", "attention to what came before")
    if family.window_period is not None:
        period = family.window_period
        full, window = "full_attention", "sliding_attention"
        expected = [window if (i + 1) % period else full for i in range(config.num_hidden_layers)]
        if list(config.layer_types) != expected:
            raise _differs("`layer_types`", f"every {period}th layer without a window")
    elif "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise _differs("layers with a window", "attention to all in every layer")


def _differs(what: str, does: str) -> ModelError:
    return ModelError(f"the config says {what}, and llama.cpp computes with {does}", where="config.json", hint=HINT)


def _rope(config: PreTrainedConfig, family: Family) -> dict[str, Any]:
    """The parameters of RoPE in layers that attend to all. Raises ModelError for kinds llama.cpp has not."""
    found: Mapping[str, Any] = config.rope_parameters or {}
    if "full_attention" in found:
        local = found.get("sliding_attention") or {}
        if local.get("rope_type", "default") != "default" or float(local.get("rope_theta", 0)) != family.local_rope:
            raise _differs(f"`rope_parameters` {dict(local)} in layers with a window", f"the base {family.local_rope}")
        found = found["full_attention"]
    rope = dict(found)
    kind = rope.setdefault("rope_type", "default")
    if kind not in ("default", "linear", "yarn", "llama3"):
        raise _differs(f"`rope_type: {kind}`", "default, linear, yarn or llama3")
    if kind == "yarn":
        own = {key: rope[key] for key in ("attention_factor", "mscale", "mscale_all_dim", "truncate") if rope.get(key)}
        usual = 0.1 * math.log(float(rope["factor"])) + 1.0
        if own and not (set(own) == {"attention_factor"} and abs(own["attention_factor"] - usual) < 1e-6):
            raise _differs(f"{own} for yarn", f"its own attention factor, {usual:.4f} here")
        if (rope.get("beta_fast") or 32) != 32 or (rope.get("beta_slow") or 1) != 1:
            raise _differs("`beta_fast` or `beta_slow` for yarn", "32 and 1")
    if float(rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0) != 1.0:
        raise _differs("`partial_rotary_factor`", "all of a head")
    return rope


def _rope_keys(rope: Mapping[str, Any]) -> dict[str, int | float | str]:
    keys: dict[str, int | float | str] = {"rope.freq_base": float(rope["rope_theta"])}
    if rope["rope_type"] in ("linear", "yarn"):
        keys |= {"rope.scaling.type": str(rope["rope_type"]), "rope.scaling.factor": float(rope["factor"])}
    if rope["rope_type"] == "yarn":
        keys["rope.scaling.original_context_length"] = int(rope["original_max_position_embeddings"])
    return keys


def _window_keys(config: PreTrainedConfig, family: Family, notes: list[str]) -> dict[str, int | float | str]:
    window = getattr(config, "sliding_window", None)
    if family.window_period is not None:
        return {"attention.sliding_window": int(window)} if window else {}
    if window and window < config.max_position_embeddings and getattr(config, "use_sliding_window", True):
        notes.append(
            f"the model attends to the last {window:,} tokens, llama.cpp to all: texts longer than that are read otherwise"
        )
    return {}


def _llama3_factors(rope: Mapping[str, Any], head_dim: int) -> NDArray[np.float32]:
    """By how much each frequency is slowed: not at all where it turns often within the old context, by `factor` where it does not
    turn once, in between smoothly (transformers' `_compute_llama3_parameters`)."""
    factor, old = float(rope["factor"]), float(rope["original_max_position_embeddings"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    frequencies = float(rope["rope_theta"]) ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = old * frequencies / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - smooth) / factor + smooth)).astype(np.float32)
