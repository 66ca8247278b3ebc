"""Merged weights in the layout of Hugging Face: as they are, in a type that is asked for, or in fewer bits.

Fewer bits come from torchao (int8, int4, int8-dynamic), bitsandbytes (nf4), GPTQModel (gptq) and llm-compressor (awq), through what
transformers reads again, in safetensors. They are made of the written weights, so that what is quantised is what was checked.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig

from tunedock.errors import DependencyError, ModelError
from tunedock.model import adapter as adapters
from tunedock.model.chat_facts import ChatFacts
from tunedock.model.load import find_device
from tunedock.model.quantize import bits_and_bytes
from tunedock.model.score import score_layer
from tunedock.model.session import Base

GROUP = 32
"""Weights that share a scale, of int4 where its packed form has no kernel."""
CALIBRATION_ROWS = 128
FOUR_BITS: torch.dtype = getattr(torch, "int4")  # noqa: B009 - there, and unknown to PyTorch's own stubs


def write(model: nn.Module, folder: Path, facts: ChatFacts, dtype: torch.dtype, max_shard_size: str) -> None:
    """The model's weights in `dtype`, its config, and how it generates."""
    model = model.to(dtype)
    if score_layer(model) is None:  # a reward model generates nothing
        generation = GenerationConfig.from_model_config(model.config)
        current = getattr(model, "generation_config", None) or generation
        current.eos_token_id = facts.stop_ids
        if current.temperature or current.top_p or current.top_k:
            current.do_sample = True  # sampling settings without it are refused when written
        model.generation_config = current
    adapters.save(model, folder, max_shard_size=max_shard_size)


def quantise(
    whole: Path, folder: Path, kind: str, base: Base, rows: Sequence[Sequence[int]], max_shard_size: str
) -> list[str]:
    """Writes the weights of the folder `whole` to `folder` in fewer bits. `rows`: token ids of training rows, to calibrate with.

    Returns what is worth saying of it. Raises DependencyError without the library, ModelError where it fails.
    """
    try:
        if kind == "awq":
            _awq(whole, folder, rows)
            return []
        config, notes = _config(kind, whole, base, rows)
        model = AutoModelForCausalLM.from_pretrained(
            whole, dtype="auto", quantization_config=config, device_map=find_device(), use_safetensors=True
        )
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    except (ImportError, NotImplementedError) as error:
        raise DependencyError(
            f"`{kind}` cannot be made on this machine: {error}", where="--quantize", hint=_INSTALL[kind]
        ) from error
    except (RuntimeError, ValueError, AssertionError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"`{kind}` cannot be made of this model: {first}", where="--quantize") from error
    unsafe = [path.name for path in folder.glob("*.bin")]
    if unsafe:
        raise ModelError(
            f"the library would write {unsafe[0]}, a pickle, which runs code when it is read",
            where="--quantize",
            hint=_INSTALL[kind],
        )
    _share_modes(folder)
    return notes


_INSTALL = {
    "int8": "pip install -U 'tunedock[quantize-export]'",
    "int8-dynamic": "pip install -U 'tunedock[quantize-export]'",
    "int4": "pip install -U 'tunedock[quantize-export]'; its packed form needs a GPU and the package mslk",
    "nf4": "pip install 'tunedock[quantize]'",
    "gptq": "pip install gptqmodel optimum",
    "awq": "pip install llmcompressor",
}


def _config(kind: str, whole: Path, base: Base, rows: Sequence[Sequence[int]]) -> tuple[Any, list[str]]:
    """(transformers' quantisation config, notes)."""
    if kind == "nf4":
        return bits_and_bytes("nf4", torch.bfloat16), []
    if kind == "gptq":
        from transformers import GPTQConfig

        texts = base.tokenizer.batch_decode([list(ids) for ids in rows])
        return GPTQConfig(bits=4, group_size=128, dataset=texts, tokenizer=base.tokenizer), []
    if importlib.util.find_spec("torchao") is None:
        raise DependencyError("torchao is not installed", where=f"--quantize {kind}", hint=_INSTALL[kind])
    from torchao import quantization
    from transformers import TorchAoConfig

    if kind == "int8":
        return TorchAoConfig(quantization.Int8WeightOnlyConfig()), []
    if kind == "int8-dynamic":
        return TorchAoConfig(quantization.Int8DynamicActivationInt8WeightConfig()), []
    if torch.cuda.is_available() and importlib.util.find_spec("mslk") is not None:
        return TorchAoConfig(quantization.Int4WeightOnlyConfig(group_size=128)), []
    by_group = quantization.IntxWeightOnlyConfig(
        weight_dtype=FOUR_BITS, granularity=quantization.PerGroup(GROUP)
    )  # fmt: skip
    return TorchAoConfig(by_group), [
        "int4 without a GPU: the values are those of four bits, kept in bytes; nf4 and GGUF's q4_k_m are half the size"
    ]


def _awq(whole: Path, folder: Path, rows: Sequence[Sequence[int]]) -> None:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.awq import AWQModifier

    ids = [list(row) for row in rows]
    oneshot(
        model=str(whole),
        dataset=Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}),
        recipe=[AWQModifier(targets=["Linear"], scheme="W4A16_ASYM", ignore=["lm_head"])],
        max_seq_length=max(map(len, ids)),
        num_calibration_samples=len(ids),
        output_dir=str(folder),
    )


def _share_modes(folder: Path) -> None:
    """Who may read the config may read the weights, which safetensors writes for their owner alone."""
    mode = (folder / "config.json").stat().st_mode & 0o777
    for file in folder.glob("*.safetensors"):
        file.chmod(mode)


def leave_beside(whole: Path, folder: Path) -> None:
    """The generation config, which a quantised model's own writing may not bring."""
    for name in ("generation_config.json",):
        if (whole / name).is_file():
            shutil.copyfile(whole / name, folder / name)
