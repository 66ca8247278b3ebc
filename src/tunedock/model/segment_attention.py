"""Attention on the CPU, a block of queries at a time.

Forward and backward walk the blocks themselves and write into one result, so that no block costs autograd nodes, slices filled up
with zeros, or copies of what the model holds already. `WeighedAttention` makes matrix products and, between them, one pass of a
compiled kernel over the scores: in bfloat16 faster than `SegmentAttention`, which is PyTorch's flash kernel
(docs/decisions/0007). The scores are rounded to the type of the products, as in transformers' eager attention.

Shapes: H query heads, K key heads, G = H / K, T tokens of a row, Q queries and M keys of a block, D size of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from tunedock.model.blocks import Block, Tile
from tunedock.model.kernels import Kernels

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

Blocks = list[tuple[Block, Tensor | None]]


class SegmentAttention(torch.autograd.Function):
    """query [1, H, T, D], key and value [1, K, T, D] -> [1, H, T, D]."""

    @staticmethod
    def forward(ctx: FunctionCtx, query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scale: float) -> Tensor:
        heads, tokens, size = query.shape[1:]
        out = query.new_empty(1, tokens, heads, size).transpose(1, 2)
        out[:, :, blocks[-1][0].end :] = 0.0
        logsumexps: list[Tensor] = []
        for block, mask_QM in blocks:
            made, logsumexp = _forward(
                _grouped(query[:, :, block.start : block.end], key.shape[1]),
                _keys(key, block, heads),
                _keys(value, block, heads),
                0.0,
                mask_QM is None,
                attn_mask=mask_QM,
                scale=scale,
            )
            out[:, :, block.start : block.end] = made.flatten(0, 1)
            logsumexps.append(logsumexp)
        ctx.save_for_backward(query, key, value, out, *logsumexps)
        ctx.blocks, ctx.scale = blocks, scale  # type: ignore[attr-defined]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, out, *logsumexps = ctx.saved_tensors
        kinds, heads = key.shape[1], query.shape[1]
        grads = [torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)]
        grads[0][:, :, ctx.blocks[-1][0].end :] = 0.0
        for (block, mask_QM), logsumexp in zip(ctx.blocks, logsumexps, strict=True):
            rows = slice(block.start, block.end)
            grad_query, grad_key, grad_value = _backward(
                _grouped(grad_out[:, :, rows], kinds),
                _grouped(query[:, :, rows], kinds),
                _keys(key, block, heads),
                _keys(value, block, heads),
                _grouped(out[:, :, rows], kinds),
                logsumexp,
                0.0,
                mask_QM is None,
                attn_mask=mask_QM,
                scale=ctx.scale,
            )
            grads[0][:, :, rows] = grad_query.flatten(0, 1)
            at = 0
            for start, end in block.keys:
                for grad, part in ((grads[1], grad_key), (grads[2], grad_value)):
                    grad[0, :, start:end] += part[:, :, at : at + end - start].sum(1)
                at += end - start
        return grads[0], grads[1], grads[2], None, None


class WeighedAttention(torch.autograd.Function):
    """query [1, H, T, D], key and value [1, K, T, D] -> [1, H, T, D]. Scale above 0."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        tiles: list[Tile],
        window: int | None,
        scale: float,
        kernels: Kernels,
    ) -> Tensor:
        kinds = key.shape[1]
        out = query.new_empty(1, query.shape[2], *query.shape[1::2]).transpose(1, 2)
        out[:, :, tiles[-1].block.end :] = 0.0
        for tile in tiles:
            scores = torch.bmm(_stacked(query, tile, kinds), _seen(key, tile.keys).transpose(1, 2))
            _weigh(kernels, "weigh", [scores], tile, window, scale)
            _put(out, tile, torch.bmm(scores, _seen(value, tile.keys)))
        ctx.save_for_backward(query, key, value)
        ctx.rest = tiles, window, scale, kernels
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        tiles, window, scale, kernels = ctx.rest
        kinds = key.shape[1]
        grad_query = torch.empty_like(query)
        grad_query[:, :, tiles[-1].block.end :] = 0.0
        grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
        for tile in tiles:
            queries, keys = _stacked(query, tile, kinds), _seen(key, tile.keys)
            grads = _stacked(grad_out, tile, kinds)
            weights = torch.bmm(queries, keys.transpose(1, 2))
            slopes = torch.bmm(grads, _seen(value, tile.keys).transpose(1, 2))
            _weigh(kernels, "weigh_backward", [weights, slopes], tile, window, scale)
            _put(grad_query, tile, torch.bmm(slopes, keys))
            _add(grad_key, tile, torch.bmm(slopes.transpose(1, 2), queries))
            _add(grad_value, tile, torch.bmm(weights.transpose(1, 2), grads))
        return grad_query, grad_key, grad_value, None, None, None, None


segment_attention: Callable[..., Tensor] = SegmentAttention.apply
weighed_attention: Callable[..., Tensor] = WeighedAttention.apply


def _weigh(kernels: Kernels, name: str, scores: list[Tensor], tile: Tile, window: int | None, scale: float) -> None:
    """scores [K, G * Q, M], in place."""
    kinds, rows, _ = scores[0].shape
    kernels(name, scores[0].dtype, *scores, kinds * rows, *tile.sizes, window or 0, scale)


def _stacked(states: Tensor, tile: Tile, kinds: int) -> Tensor:
    """[1, H, T, D] -> [K, G * Q, D]: the tile's queries, those of heads that share a key head one below the other."""
    return states[0, :, tile.start : tile.end].reshape(kinds, -1, states.shape[-1])


def _put(out: Tensor, tile: Tile, made: Tensor) -> None:
    """Writes the block's part of [K, G * Q, D] to its place in [1, H, T, D]."""
    block, kinds, size = tile.block, made.shape[0], made.shape[-1]
    made = made.view(kinds, -1, tile.end - tile.start, size)[:, :, block.start - tile.start : block.end - tile.start]
    out[0, :, block.start : block.end] = made.flatten(0, 1)


def _add(total: Tensor, tile: Tile, part: Tensor) -> None:
    """Adds the block's part of [K, M, D] to where its keys stand in [1, K, T, D]."""
    at = tile.left
    for start, end in tile.block.keys:
        total[0, :, start:end] += part[:, at : at + end - start]
        at += end - start


def _seen(states: Tensor, keys: tuple[tuple[int, int], ...]) -> Tensor:
    """[1, K, T, D] -> [K, M, D]."""
    pieces = [states[0, :, start:end] for start, end in keys]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)


def _grouped(states: Tensor, kinds: int) -> Tensor:
    """[1, H, Q, D] -> [K, G, Q, D]: the heads that share a key head side by side."""
    _, heads, queries, size = states.shape
    return states[0].view(kinds, heads // kinds, queries, size)


def _keys(states: Tensor, block: Block, heads: int) -> Tensor:
    """[1, K, T, D] -> [K, G, M, D]: a block's keys, the same for each query head of a group without a copy."""
    return _seen(states, block.keys)[:, None].expand(-1, heads // states.shape[1], -1, -1)
