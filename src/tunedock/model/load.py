"""Base weights and tokenizer of a recipe, on a device, in a precision."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from tunedock.errors import ModelError
from tunedock.model.hub import Located, locate
from tunedock.model.policy import Precision
from tunedock.recipe.schema import Model, Recipe


def find_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def has_bf16(device: torch.device) -> bool:
    """Whether bfloat16 products are native there; emulated ones are slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        capabilities = (
            Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
            if Path("/proc/cpuinfo").exists()
            else ""
        )
        return any(flag in capabilities for flag in ("avx512_bf16", "amx_bf16", " bf16 "))
    return False


def precision(recipe: Recipe, device: torch.device) -> Precision:
    """What weights are held in and what products are computed in.

    Weights that are trained stay in float32; a frozen base under an adapter is held in the compute type.
    """
    train = recipe.train
    if train.fp16:
        compute = torch.float16
    elif train.bf16 or (train.bf16 is None and has_bf16(device)):
        compute = torch.bfloat16
    else:
        compute = torch.float32
    return Precision(weights=compute if recipe.adapter.kind == "lora" else torch.float32, compute=compute)


def locate_base(recipe: Recipe) -> Located:
    model = recipe.model
    return locate(
        model.path, revision=model.revision, hub=recipe.hub, offline=recipe.offline, code=model.trust_remote_code
    )


def load_tokenizer(folder: Path, model: Model) -> PreTrainedTokenizerBase:
    """The tokenizer, with `model.chat_template` in place of its own when the recipe gives one. It must be a fast one."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # policy: whatever the tokenizer's files make the library raise, they are at fault
        raise ModelError(
            f"the tokenizer cannot be read: {_first_line(error)}",
            where=str(folder),
            hint="the folder needs tokenizer.json (or the files it can be made from)",
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError("only a slow tokenizer; character offsets need a fast one (tokenizer.json)", where=str(folder))
    if model.chat_template is not None:
        try:
            tokenizer.chat_template = Path(model.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(
                f"the chat template cannot be read: {error}", where=f"model.chat_template: {model.chat_template}"
            ) from None
    return tokenizer


def load_weights(folder: Path, model: Model, *, dtype: torch.dtype, device: torch.device, seed: int = 0) -> nn.Module:
    """The causal language model of a folder, in eval mode. Safetensors only: other weight files can run code."""
    _require_readable_config(folder)
    try:
        if model.init == "random":
            torch.manual_seed(seed)
            config = AutoConfig.from_pretrained(
                folder, trust_remote_code=model.trust_remote_code, **model.config_overrides
            )
            made = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=model.trust_remote_code)
        else:
            made = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, trust_remote_code=model.trust_remote_code, use_safetensors=True
            )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # policy: whatever the model's files make the library raise, they are at fault
        raise ModelError(
            f"the weights cannot be loaded: {_first_line(error)}",
            where=str(folder),
            hint="the folder needs config.json and *.safetensors of a causal language model",
        ) from error
    moved: nn.Module = made.to(device).eval()
    return moved


def stop_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end generation: the tokenizer's eos and those of generation_config.json."""
    found = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    if (folder / "generation_config.json").is_file():
        eos = GenerationConfig.from_pretrained(folder).eos_token_id
        found |= set(eos) if isinstance(eos, list) else {eos}
    return frozenset(int(token) for token in found if token is not None)


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Padding is masked wherever it stands, so any id serves; the tokenizer's own where it has one."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0)


def _require_readable_config(folder: Path) -> Mapping[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            "config.json is missing", where=str(folder), hint="point `model` at a folder with a model"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"config.json is damaged: {error}", where=str(folder)) from None
    if not isinstance(config, dict):
        raise ModelError("config.json holds no object", where=str(folder))
    return config


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
