"""A merged model -> a GGUF file, and its tensors, read back, held against the model's and the base's."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from torch import Tensor, nn

from tunedock.errors import CheckError
from tunedock.export.gguf import quantise as quantiser
from tunedock.export.gguf.shape import Shape, shape_of
from tunedock.export.gguf.tensors import Array, tensors
from tunedock.export.gguf.vocabulary import vocabulary_of
from tunedock.export.gguf.write import LARGEST_F16, Kind, write
from tunedock.model.chat_facts import ChatFacts
from tunedock.model.session import Base

FLOATS: tuple[Kind, ...] = ("f32", "f16", "bf16", "q8_0")
"""Kinds that are written here; others are made by llama.cpp of a file of floats."""
ERRORS: Mapping[str, float] = {
    "f32": 1e-6, "f16": 1e-3, "bf16": 5e-3, "q8_0": 0.02, "q6": 0.05, "q5": 0.1, "q4": 0.2, "q3": 0.4, "q2": 0.7,
}  # fmt: skip
"""Largest relative error (root of mean squares) of a tensor, by the beginning of a kind's name."""


@dataclass(frozen=True, slots=True)
class Tensors:
    """What the file's tensors are, read again."""

    tensors: int
    changed_tensors: int
    """Of the model, against the base."""
    largest_error: float
    """Relative, of a tensor against the model's."""
    worst_tensor: str
    nearer_to_base: bool
    """Whether all of them together are nearer to the base's weights than to the model's."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def judge(self, kind: str) -> None:
        """Raises CheckError for a file that holds something else."""
        limit = next(limit for name, limit in ERRORS.items() if kind.startswith(name))
        if not self.changed_tensors:
            raise CheckError("the weights are the base's own: nothing was trained or merged", where="export")
        if not self.largest_error <= limit:
            raise CheckError(
                f"the file's tensor `{self.worst_tensor}` is not the model's: it differs by {self.largest_error:.3g}, "
                f"and {kind} may by {limit:.3g}",
                where="export",
            )
        if self.nearer_to_base:
            raise CheckError("the file's weights are nearer to the base's than to the trained model's", where="export")


def make(path: Path, model: nn.Module, base: Base, facts: ChatFacts, kind: str, name: str) -> list[str]:
    """Writes the file; what is worth saying of it. Raises ModelError for what llama.cpp cannot be told, DependencyError."""
    state: Mapping[str, Tensor] = model.state_dict()
    shape = shape_of(model.config)
    rows = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    words = vocabulary_of(base.tokenizer, rows, facts.stop_ids)
    if kind in FLOATS:
        write(path, state, shape, words, kind, name)
    else:
        quantiser.require(kind)
        with tempfile.TemporaryDirectory(prefix=".floats-", dir=path.parent) as folder:
            floats = Path(folder, "model.gguf")
            write(floats, state, shape, words, "f16" if _fits_f16(state) else "f32", name)
            quantiser.quantise(floats, path, kind)
    return [*shape.notes, *words.notes]


def _fits_f16(state: Mapping[str, Tensor]) -> bool:
    return all(float(tensor.abs().max()) <= LARGEST_F16 for tensor in state.values() if tensor.numel())


def tensors_of(path: Path, state: Mapping[str, Tensor], original: Mapping[str, Tensor], shape: Shape) -> Tensors:
    """Reads the file's tensors and holds them against the model's and the base's. Raises CheckError for one that is not there."""
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    worst, worst_name, count, changed = 0.0, "", 0, 0
    to_model = to_base = 0.0
    before = dict(tensors(original, shape))
    for name, wanted in tensors(state, shape):
        held = found.pop(name, None)
        if held is None:
            raise CheckError(f"the file has no tensor `{name}`", where=str(path))
        values = gguf.quants.dequantize(held.data, held.tensor_type).reshape(wanted.shape)
        error = _distance(values, wanted)
        relative = (error / max(float(np.square(wanted, dtype=np.float64).sum()), 1e-30)) ** 0.5
        count += 1
        if not relative <= worst:
            worst, worst_name = relative, name
        own = before.get(name)
        if own is not None and own.shape == wanted.shape:
            changed += not np.array_equal(own, wanted)
            to_model += error
            to_base += _distance(values, own)
    if found:
        raise CheckError(f"the file has a tensor `{next(iter(found))}` that the model has not", where=str(path))
    return Tensors(count, changed, worst, worst_name, to_base < to_model)


def _distance(a: Array, b: Array) -> float:
    return float(np.square(a.astype(np.float64) - b).sum())
