"""Experiences as tensors, for a checkpoint, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tunedock.data.sample import Segment
from tunedock.objective.experience import Answer, Experience

_BY_TOKEN = tuple(field.name for field in fields(Answer) if field.name != "reward")


def to_tensors(experiences: Sequence[Experience]) -> dict[str, Tensor]:
    """All segments one behind the other with their lengths, and what is known of the answers' tokens; names as bytes."""
    segments = [segment for experience in experiences for segment in experience.segments]
    answers = [answer for experience in experiences for answer in experience.answers]
    names = [experience.row_id.encode("utf-8", "surrogatepass") for experience in experiences]
    kept = {
        "tokens": _joined([segment.tokens_T for segment in segments], np.int32),
        "weights": _joined([segment.weights_T for segment in segments], np.float32),
        "lengths": np.asarray([len(segment.tokens_T) for segment in segments], np.int64),
        "answers": np.asarray([len(experience.answers) for experience in experiences], np.int64),
        "reward": np.asarray([answer.reward for answer in answers], np.float64),
        "names": np.frombuffer(b"".join(names), np.uint8).copy(),
        "name_lengths": np.asarray([len(name) for name in names], np.int64),
    }
    for name in _BY_TOKEN:
        values = [getattr(answer, name) for answer in answers]
        if all(value is not None for value in values):
            kept[name] = _joined(values, np.float32)
    return {name: torch.from_numpy(value) for name, value in kept.items()}


def from_tensors(tensors: Mapping[str, Tensor]) -> list[Experience]:
    """What `to_tensors` made them of."""
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    tokens, weights = (_parts(arrays[name], arrays["lengths"]) for name in ("tokens", "weights"))
    names = [bytes(part).decode("utf-8", "surrogatepass") for part in _parts(arrays["names"], arrays["name_lengths"])]
    made: list[Experience] = []
    at = number = 0
    lengths = _answer_lengths(arrays)
    by_token = {name: _parts(arrays[name], lengths) for name in _BY_TOKEN if name in arrays}
    for name, count in zip(names, arrays["answers"].tolist(), strict=True):
        segments = tuple(Segment(tokens[at + i], weights[at + i], -1 if i == 0 else 0) for i in range(count + 1))
        answers = tuple(
            Answer(reward=float(arrays["reward"][i]), **{key: parts[i] for key, parts in by_token.items()})
            for i in range(number, number + count)
        )
        made.append(Experience(name, segments, answers=answers))
        at, number = at + count + 1, number + count
    return made


def _answer_lengths(arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
    """Those of all segments but the prompts."""
    starts = np.cumsum([0, *(arrays["answers"] + 1)])[:-1]
    lengths: NDArray[np.int64] = np.delete(arrays["lengths"], starts)
    return lengths


def _joined(parts: Sequence[NDArray[Any]], dtype: type[np.generic]) -> NDArray[Any]:
    return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)


def _parts(values: NDArray[Any], lengths: NDArray[np.int64]) -> list[NDArray[Any]]:
    return np.split(values, np.cumsum(lengths)[:-1]) if len(lengths) else []
