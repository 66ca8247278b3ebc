"""Attention over trees: one interface, a backend per device.

A row holds the segments of a tree in depth-first order (`data.layout.Tree`). A token sees the earlier tokens of its own path: in
that order these are just the tokens whose segment's subtree has not ended yet. The model's decoder layers call the function that
is registered here with transformers under the name `NAME`; the row's `RowAttention` comes along as the keyword `KEYWORD`. For what
is no such row (generation, padded rows) the model gets its own attention back: `plain`.

Backends: `segments` (CPU: a product per chain of segments, since a dense mask over the row costs ten times the time), `varlen` and
`flex` (CUDA: documents side by side, and trees), `dense` (a mask over the row; where nothing better is).

Shapes: H query heads, K key heads, G = H / K, T tokens of a row, Q queries and M keys of a block, D size of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface

from tunedock.data.layout import Tree
from tunedock.model.blocks import BLOCK_QUERIES, Block, Tile, blocks, mask_of, tile
from tunedock.model.kernels import kernels
from tunedock.model.segment_attention import segment_attention, weighed_attention

NAME = "tunedock_tree"
KEYWORD = "row_attention"


class RowAttention:
    """What attention has to know of a row, made once and read by every layer. What stands behind the tree's end is filler.

    `calls` counts the layers that asked for it: a model that accepts another attention and never calls it is found by that.
    """

    def __init__(self, tree: Tree, position_T: Tensor) -> None:
        self.tree = tree
        self.position_T = position_T
        self.calls = 0
        self._blocks: dict[tuple[int | None, torch.dtype], list[tuple[Block, Tensor | None]]] = {}
        self._made: dict[Any, Any] = {}

    @property
    def device(self) -> torch.device:
        return self.position_T.device

    @property
    def tokens(self) -> int:
        return len(self.position_T)

    def blocks(self, window: int | None, dtype: torch.dtype) -> list[tuple[Block, Tensor | None]]:
        """The row cut into blocks of queries with their keys, and the mask [Q, M] to add where plain causality is not enough."""
        key = (window, dtype)
        if key not in self._blocks:
            self._blocks[key] = [
                (block, mask_of(block, window, dtype, self.device)) for block in blocks(self.tree, window)
            ]
        return self._blocks[key]

    def tiles(self, window: int | None) -> list[Tile]:
        """The row cut into blocks of at most BLOCK_QUERIES queries, in the shapes they are computed in."""
        cut = lambda: [tile(block, self.tokens) for block in blocks(self.tree, window, queries=BLOCK_QUERIES)]  # noqa: E731
        return self._once(("tiles", window), cut)  # type: ignore[no-any-return]

    def dense_mask(self, window: int | None) -> Tensor:
        """[T, T], True where a query (first) sees a key."""
        return self._once(("dense", window), lambda: self._dense(window))  # type: ignore[no-any-return]

    def subtree_end_T(self) -> Tensor:
        """For each token, where the last descendant of its segment ends."""
        return self._once("ends", self._ends)  # type: ignore[no-any-return]

    def cu_seqlens(self) -> tuple[Tensor, int]:
        """Ends of the documents, int32 with a zero in front, and the longest; for a row of documents side by side."""
        return self._once("cu_seqlens", self._cu_seqlens)  # type: ignore[no-any-return]

    def block_mask(self, window: int | None) -> Any:
        """FlexAttention's mask."""
        return self._once(("flex", window), lambda: _flex_mask(self, window))

    def _once(self, key: Any, make: Any) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _ends(self) -> Tensor:
        lengths = torch.as_tensor(self.tree.end_S - self.tree.start_S)
        ends_T = torch.arange(1, self.tokens + 1)  # filler sees itself
        ends_T[: int(self.tree.end_S[-1])] = torch.as_tensor(self.tree.subtree_end_S()).repeat_interleave(lengths)
        return ends_T.to(self.device)

    def _dense(self, window: int | None) -> Tensor:
        at_T = torch.arange(self.tokens, device=self.device)
        mask_TT = (at_T[None, :] <= at_T[:, None]) & (at_T[:, None] < self.subtree_end_T()[None, :])
        if window is not None:
            mask_TT &= self.position_T[:, None] - self.position_T[None, :] < window
        return mask_TT

    def _cu_seqlens(self) -> tuple[Tensor, int]:
        ends = torch.as_tensor(self.tree.end_S, dtype=torch.int32)
        cu_seqlens = torch.cat([ends.new_zeros(1), ends]).to(self.device)
        return cu_seqlens, int((self.tree.end_S - self.tree.start_S).max())


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, as transformers calls it. query [1, H, T, D], key and value [1, K, T, D]; returns [1, T, H, D]."""
    row: RowAttention | None = kwargs.get(KEYWORD)
    if row is None:
        raise RuntimeError("no row came along; outside of rows, the model keeps its own attention (`plain`)")
    row.calls += 1
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if (
        key.dtype != query.dtype or value.dtype != query.dtype
    ):  # rotary leaves float32 behind under autocast, in some models
        query, key = query.to(value.dtype), key.to(value.dtype)
    if softcap is not None or s_aux is not None or (dropout > 0.0 and query.device.type == "cpu"):
        out = _explicit(query, key, value, row, dropout, scale, sliding_window, softcap, s_aux)
    elif query.device.type == "cpu":
        out = _segments(query, key, value, row, scale, sliding_window)
    elif query.device.type == "cuda" and dropout == 0.0:
        out = _cuda(query, key, value, row, scale, sliding_window)
    else:
        out = _dense(query, key, value, row, dropout, scale, sliding_window)
    return out.transpose(1, 2), None


def _segments(query: Tensor, key: Tensor, value: Tensor, row: RowAttention, scale: float, window: int | None) -> Tensor:
    compiled = kernels()
    out: Tensor
    if compiled is not None and query.dtype in (torch.bfloat16, torch.float32) and scale > 0.0:
        out = weighed_attention(query, key, value, row.tiles(window), window, scale, compiled)
    else:
        out = segment_attention(query, key, value, row.blocks(window, query.dtype), scale)
    return out


def _explicit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row: RowAttention,
    dropout: float,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks_H: Tensor | None,
) -> Tensor:
    """Step by step, for what no fused kernel does: soft caps (Gemma 2), sinks (GPT-OSS). A block at a time; out [1, H, T, D]."""
    groups = query.shape[1] // key.shape[1]
    pieces: list[Tensor] = []
    for block, mask_QM in row.blocks(window, torch.float32):
        keys = torch.cat([key[:, :, s:e] for s, e in block.keys], 2).repeat_interleave(groups, 1)
        values = torch.cat([value[:, :, s:e] for s, e in block.keys], 2).repeat_interleave(groups, 1)
        scores = (query[:, :, block.start : block.end] @ keys.transpose(-1, -2)).float() * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if mask_QM is None:
            length = block.end - block.start
            mask_QM = torch.full((length, length), -torch.inf, device=scores.device).triu(1)
        scores = scores + mask_QM
        if sinks_H is not None:
            sinks = sinks_H.float().reshape(1, -1, 1, 1).expand(1, scores.shape[1], scores.shape[2], 1)
            scores = torch.cat([scores, sinks], -1)
        weights = torch.softmax(scores, -1)
        if sinks_H is not None:
            weights = weights[..., :-1]
        weights = functional.dropout(weights.to(value.dtype), dropout)
        pieces.append(weights @ values)
    pieces.append(value.new_zeros(1, query.shape[1], row.tokens - int(row.tree.end_S[-1]), value.shape[-1]))
    return torch.cat(pieces, 2)


def _dense(
    query: Tensor, key: Tensor, value: Tensor, row: RowAttention, dropout: float, scale: float, window: int | None
) -> Tensor:
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=row.dense_mask(window), dropout_p=dropout, scale=scale, enable_gqa=True
    )


def _cuda(query: Tensor, key: Tensor, value: Tensor, row: RowAttention, scale: float, window: int | None) -> Tensor:
    if row.tree.plain and query.dtype != torch.float32 and _varlen() is not None:
        cu_seqlens, longest = row.cu_seqlens()
        flat = (states[0].transpose(0, 1) for states in (query, key, value))
        span = (-1 if window is None else window - 1, 0)
        made = _varlen()(
            *flat, cu_seqlens, cu_seqlens, longest, longest, scale=scale, window_size=span, enable_gqa=True
        )
        return made.transpose(0, 1)[None]  # type: ignore[no-any-return]
    return _flex()(query, key, value, block_mask=row.block_mask(window), scale=scale, enable_gqa=True)  # type: ignore[no-any-return]


@cache
def _varlen() -> Any:
    """PyTorch's variable-length flash attention; None before PyTorch 2.10 and on GPUs older than Ampere."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if torch.cuda.get_device_capability() >= (8, 0) else None


@cache
def _flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


@cache
def _flex_mask_maker() -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return torch.compile(create_block_mask, dynamic=True)


def _flex_mask(row: RowAttention, window: int | None) -> Any:
    end_T, position_T = row.subtree_end_T(), row.position_T

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (key <= query) & (query < end_T[key])
        if window is not None:
            seen = seen & (position_T[query] - position_T[key] < window)
        return seen

    return _flex_mask_maker()(sees, None, None, row.tokens, row.tokens, device=row.device)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """transformers makes no mask: the row brings its own."""


_own: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
"""The attention each model had before."""


def install(model: Any) -> bool:
    """Makes the model's layers call `attend`. Returns whether the model lets its attention be chosen."""
    if NAME not in AttentionInterface().valid_keys():
        AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, _no_mask)
    before = model.config._attn_implementation
    if before == NAME:
        return True
    try:
        model.set_attn_implementation(NAME)
    except (ValueError, AttributeError, ImportError):
        return False
    if model.config._attn_implementation != NAME:
        return False
    _own[model] = before
    return True


def leave_out_of_compiling() -> None:
    """PyTorch's compiler goes around `attend` from here on."""
    AttentionInterface.register(NAME, torch.compiler.disable(attend))  # type: ignore[no-untyped-call]


def uninstall(model: Any) -> None:
    """Gives the model the attention it had (SDPA, where another model with the same config object was given ours)."""
    if model.config._attn_implementation == NAME:
        model.set_attn_implementation(_own.get(model, "sdpa"))


@contextmanager
def plain(model: Any) -> Iterator[None]:
    """While it holds, the model has its own attention."""
    installed = model.config._attn_implementation == NAME
    uninstall(model)
    try:
        yield
    finally:
        if installed:
            install(model)
