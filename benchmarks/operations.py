"""Floating-point operations a training step needs. A multiplication and an addition count as two; recomputation does not count.

A linear map of P weights costs 2P a token forward and 2P for the gradient of its input; 2P more where its weights are trained.
So LoRA needs 4 a weight of the frozen layers and 6 a weight of the adapters; full training 6 a weight. The output layer is needed
for trained tokens only. Causal attention over n tokens has n(n+1)/2 pairs, two products of the head size each, and the backward
pass twice that.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.models import Shape


def training_operations(shape: Shape, lengths: Sequence[int], trained: int, *, lora_r: int | None) -> float:
    """Operations for samples of these lengths of which `trained` tokens carry loss; `lora_r` None is full training."""
    tokens = sum(lengths)
    a_weight = 6.0 if lora_r is None else 4.0
    linear = a_weight * (shape.layer_parameters * tokens + shape.head_parameters * trained)
    adapters = 0.0 if lora_r is None else 6.0 * shape.lora_parameters(lora_r) * tokens
    return linear + adapters + _attention(shape, lengths)


def _attention(shape: Shape, lengths: Sequence[int]) -> float:
    pairs = sum(n * (n + 1) // 2 for n in lengths)
    forward = 2 * 2.0 * shape.num_attention_heads * shape.head_dim * pairs * shape.num_hidden_layers
    return 3.0 * forward
