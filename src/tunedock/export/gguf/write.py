"""A model in memory and its tokenizer -> a GGUF file of f32, f16, bf16 or q8_0.

Tensors of one dimension (norms, biases) stay float32, as llama.cpp has them. What is smaller than q8_0 is made by llama.cpp of
such a file (`gguf.quantise`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from torch import Tensor

from tunedock.errors import ModelError
from tunedock.export.gguf.shape import Shape
from tunedock.export.gguf.tensors import Array, tensors
from tunedock.export.gguf.vocabulary import Vocabulary

Kind = Literal["f32", "f16", "bf16", "q8_0"]

_TYPES: dict[Kind, tuple[GGMLQuantizationType, LlamaFileType]] = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
LARGEST_F16 = 65504.0


def write(path: Path, state: Mapping[str, Tensor], shape: Shape, words: Vocabulary, kind: Kind, name: str) -> int:
    """Writes a new file; the number of its tensors. Raises ModelError for weights the type cannot hold, OSError."""
    writer = GGUFWriter(path, shape.family.arch)
    _about(writer, shape, words, kind, name)
    count = 0
    for ours, values in tensors(state, shape):
        data, stored = _stored(ours, values, kind)
        writer.add_tensor(ours, data, raw_dtype=stored)
        count += 1
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    return count


def _about(writer: GGUFWriter, shape: Shape, words: Vocabulary, kind: Kind, name: str) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(_TYPES[kind][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in shape.keys.items():
        match value:
            case bool() | str():
                writer.add_string(key, str(value))
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
    writer.add_tokenizer_model(words.model)
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    if words.scores is not None:
        writer.add_token_scores(words.scores)
    if words.merges is not None:
        writer.add_token_merges(words.merges)
    for what, index in words.ids.items():
        getattr(writer, f"add_{what}_token_id")(index)
    writer.add_add_bos_token(words.add_bos)
    writer.add_add_eos_token(words.add_eos)
    if words.model == "llama":
        writer.add_add_space_prefix(words.add_space_prefix)
    if words.chat_template is not None:
        writer.add_chat_template(words.chat_template)


def _stored(name: str, values: Array, kind: Kind) -> tuple[np.ndarray, GGMLQuantizationType]:
    """A tensor's bytes, and the type they are of."""
    wanted = _TYPES[kind][0]
    if values.ndim == 1 or wanted is GGMLQuantizationType.F32:
        return np.ascontiguousarray(values, dtype=np.float32), GGMLQuantizationType.F32
    if wanted is GGMLQuantizationType.F16 and float(np.abs(values).max(initial=0.0)) > LARGEST_F16:
        raise ModelError(
            f"`{name}` has weights beyond what float16 can say", where=f"--quantize {kind}", hint="--quantize bf16"
        )
    if wanted is GGMLQuantizationType.Q8_0 and values.shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0]:
        return values.astype(np.float16), GGMLQuantizationType.F16
    return gguf.quants.quantize(np.ascontiguousarray(values), wanted), wanted
