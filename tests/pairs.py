"""Preference pairs of random tokens, and what a policy should make of them, computed from the definition."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from tunedock.data.sample import Sample, Segment


def pair(row_id: str, prompt: int, chosen: int, rejected: int, draw: np.random.Generator, vocabulary: int) -> Sample:
    """A prompt and two completions of these lengths. Each completion's first token is context, as a template's header is."""

    def segment(length: int, parent: int) -> Segment:
        weights = draw.choice([1.0, 1.0, 0.5], length).astype(np.float32)
        weights[: length if parent < 0 else int(length > 1)] = 0.0
        return Segment(draw.integers(1, vocabulary, length).astype(np.int32), weights, parent)

    return Sample(row_id, (segment(prompt, -1), segment(chosen, 0), segment(rejected, 0)))


def pairs(count: int, vocabulary: int, seed: int = 0) -> list[Sample]:
    draw = np.random.default_rng(seed)
    sizes = draw.integers((1, 2, 2), (40, 16, 16), (count, 3))
    return [pair(f"p:{n}", *(int(size) for size in sizes[n]), draw, vocabulary) for n in range(count)]


def path_logprob(model: nn.Module, sample: Sample, leaf: int) -> Tensor:
    """Weighted log-probability of one path through a plain transformers model, in float64."""
    tokens, weights = sample.path(sample.leaves()[leaf])
    ids = torch.as_tensor(tokens, dtype=torch.int64)[None]
    logits = model(input_ids=ids).logits[0].double()
    logprobs = torch.log_softmax(logits[:-1], -1).gather(-1, ids[0, 1:, None])[:, 0]
    return (torch.as_tensor(weights[1:]) * logprobs).sum()


def rewards(model: nn.Module, reference: nn.Module, group: Sequence[Sample], beta: float) -> Tensor:
    """beta (log pi - log pi_ref) [S, 2] of chosen and rejected, path by path."""

    def of(sample: Sample, leaf: int) -> Tensor:
        with torch.no_grad():
            before = path_logprob(reference, sample, leaf)
        return beta * (path_logprob(model, sample, leaf) - before)

    return torch.stack([torch.stack([of(sample, leaf) for leaf in (0, 1)]) for sample in group])
