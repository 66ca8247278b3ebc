"""Attention of many rows in one call of a model: each token sees its own row, whose keys and values are kept in pages.

The tokens of a step, of however many rows, stand side by side without padding: [1, N]. Everything in a decoder layer but attention
looks at a token alone; attention is ours, registered with transformers under `NAME`, and is told by the keyword `KEYWORD` which
token is whose. Keys are kept as the layer gives them, turned by their positions, so a row's place in the batch changes nothing.

On the CPU a compiled kernel reads the pages where they are; without it, and on a GPU, the pages of a row are gathered first.

Shapes: N tokens of a step, R rows that have one token in it, H query heads, K key heads, D size of a head, M keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

from tunedock.model.kernels import kernels
from tunedock.serve.engines.schedule import Row, Work

NAME = "tunedock_paged"
KEYWORD = "paged_step"


class Pool:
    """Keys and values of every layer, in pages. A layer's are made when it is first met, for only then their shape is known."""

    def __init__(self, pages: int, page: int) -> None:
        self.pages, self.page = pages, page
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [pages, K, page, D] of a layer. `key`, `value` [1, K, N, D]: of this step, for their shape."""
        if number not in self._layers:
            # Not zeroed: on the CPU memory that is never written is never taken.
            shapes = ((self.pages, kept.shape[1], self.page, kept.shape[3]) for kept in (key, value))
            keys, values = (torch.empty(shape, dtype=value.dtype, device=value.device) for shape in shapes)
            self._layers[number] = (keys, values)
        return self._layers[number]

    @property
    def bytes_per_token(self) -> int:
        """Of all layers met so far."""
        kept = (tensor for pair in self._layers.values() for tensor in pair)
        return sum(tensor.shape[1] * tensor.shape[3] * tensor.element_size() for tensor in kept)


@dataclass(frozen=True, slots=True)
class Span:
    """A part of a prompt: tokens `start` to `stop` of its row, which stand from `at` on in the step."""

    at: int
    start: int
    stop: int
    pages: Tensor


class Step:
    """What attention has to know of a step's tokens, made once and read by every layer."""

    def __init__(self, works: Sequence[Work], pool: Pool, device: torch.device, *, reach: int | None = None) -> None:
        """`reach`: a position that the step is to have, for models that look at the largest (`compute.Paged.turn`). A token of
        nobody's stands there, behind all others, in the pool's last page."""
        self.pool = pool
        self.device = device
        self.windows: dict[int, int | None] = {}
        """Of the layers that have called."""
        page = pool.page
        ids: list[int] = []
        positions: list[int] = []
        places: list[int] = []
        last: list[int] = []
        self._singles: list[tuple[int, Work]] = []
        self.spans: list[Span] = []
        for work in works:
            at = len(ids)
            ids += work.row.tokens[work.start : work.stop]
            positions += range(work.start, work.stop)
            pages = work.row.pages
            places += [pages[t // page] * page + t % page for t in range(work.start, work.stop)]
            if work.draws:
                last.append(len(ids) - 1)
            if work.stop - work.start == 1:
                self._singles.append((at, work))
            else:
                used = torch.tensor(pages[: -(-work.stop // page)], device=device)
                self.spans.append(Span(at, work.start, work.stop, used))
        if reach is not None:
            nobody = Row(tokens=[0], longest=1, pages=[pool.pages - 1])
            self._singles.append((len(ids), Work(nobody, 0, 1)))
            ids.append(0)
            positions.append(reach)
            places.append((pool.pages - 1) * page)
        self.tokens = len(ids)
        self.ids_1N = torch.tensor([ids], device=device)
        self.positions_1N = torch.tensor([positions], device=device)
        self.last_R = torch.tensor(last, dtype=torch.int64, device=device)
        place_N = torch.tensor(places, device=device)
        self.page_N, self.offset_N = place_N // page, place_N % page
        self._masks: dict[tuple[int, int | None], Tensor | None] = {}

    @property
    def singles(self) -> int:
        return len(self._singles)

    @cached_property
    def at_R(self) -> Tensor:
        """Where the rows' tokens stand in the step."""
        return torch.tensor([at for at, _ in self._singles], dtype=torch.int64, device=self.device)

    @cached_property
    def length_R(self) -> Tensor:
        return torch.tensor([work.stop for _, work in self._singles], dtype=torch.int64, device=self.device)

    @cached_property
    def longest(self) -> int:
        return max((work.stop for _, work in self._singles), default=0)

    @cached_property
    def table_RP(self) -> Tensor:
        """The rows' pages, int32; what is beyond a row's last one is page 0."""
        columns = -(-self.longest // self.pool.page)
        lists = [work.row.pages[:columns] for _, work in self._singles]
        padded = [pages + [0] * (columns - len(pages)) for pages in lists]
        return torch.tensor(padded, dtype=torch.int32, device=self.device)

    def seen_RM(self, window: int | None) -> Tensor:
        """Which keys of their pages rows with one token see."""
        key = (-1, window)
        if key not in self._masks:
            at_M = torch.arange(self.table_RP.shape[1] * self.pool.page, device=self.device)
            seen_RM = at_M < self.length_R[:, None]
            if window is not None:
                seen_RM &= at_M >= self.length_R[:, None] - window
            self._masks[key] = seen_RM
        return self._masks[key]  # type: ignore[return-value]

    def seen_QM(self, span: Span, window: int | None) -> Tensor | None:
        """Which keys of its row each token of a part of a prompt sees; None for plain causality from the row's beginning."""
        if window is not None and window >= span.stop:
            window = None
        key = (span.at, window)
        if key not in self._masks:
            made = None
            if span.start > 0 or window is not None:
                query_Q1 = torch.arange(span.start, span.stop, device=self.device)[:, None]
                at_M = torch.arange(span.stop, device=self.device)
                made = at_M <= query_Q1
                if window is not None:
                    made &= at_M > query_Q1 - window
            self._masks[key] = made
        return self._masks[key]


@dataclass(frozen=True, slots=True)
class Kind:
    """How a layer weighs keys."""

    scale: float
    window: int | None
    cap: float | None
    sinks_H: Tensor | None

    @property
    def plain(self) -> bool:
        return self.cap is None and self.sinks_H is None


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
    """Attention of one layer, as transformers calls it. query [1, H, N, D], key and value [1, K, N, D]; returns [1, N, H, D]."""
    step: Step | None = kwargs.get(KEYWORD)
    if step is None:
        raise RuntimeError("no step came along: this model does not hand on what its attention is given")
    number = int(module.layer_idx)  # type: ignore[arg-type]
    step.windows[number] = sliding_window
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    kind = Kind(scale, sliding_window, softcap, s_aux)
    if query.dtype != value.dtype or key.dtype != value.dtype:  # rotary leaves float32 behind, in some models
        query, key = query.to(value.dtype), key.to(value.dtype)
    keys, values = step.pool.layer(number, key, value)
    keys[step.page_N, :, step.offset_N] = key[0].transpose(0, 1)
    values[step.page_N, :, step.offset_N] = value[0].transpose(0, 1)
    out = query.new_empty(1, step.tokens, query.shape[1], value.shape[3])
    if step.singles:
        _singles(query, keys, values, step, kind, out)
    for span in step.spans:
        _span(query, keys, values, step, span, kind, out)
    return out, None


def _singles(query: Tensor, keys: Tensor, values: Tensor, step: Step, kind: Kind, out: Tensor) -> None:
    compiled = kernels()
    if compiled is not None and query.device.type == "cpu" and query.dtype in (torch.float32, torch.bfloat16):
        _recall(query, keys, values, step, kind, out)
        return
    table_RP = step.table_RP.long()
    keys_RKMD, values_RKMD = (_gathered(pages, table_RP) for pages in (keys, values))
    query_RHD = query[0, :, step.at_R].transpose(0, 1)
    seen_R11M = step.seen_RM(kind.window)[:, None, None]
    for kept_RKMD in (
        keys_RKMD,
        values_RKMD,
    ):  # what is not seen may be no numbers, and nought times those is none either
        kept_RKMD.masked_fill_(~seen_R11M.transpose(-1, -2), 0.0)
    made = _weighed(query_RHD[:, :, None], keys_RKMD, values_RKMD, seen_R11M, kind)
    out[0, step.at_R] = made[:, :, 0]


def _recall(query: Tensor, keys: Tensor, values: Tensor, step: Step, kind: Kind, out: Tensor) -> None:
    """By the compiled kernel, which reads each key and value once, where it is."""
    compiled = kernels()
    assert compiled is not None  # noqa: S101 - asked by the caller
    heads, key_heads = query.shape[1], keys.shape[1]
    if query.stride(3) != 1:
        query = query.contiguous()
    seen = step.longest if kind.window is None else min(step.longest, kind.window)
    room_size = heads // key_heads * (keys.shape[3] + values.shape[3] + seen)
    room = torch.empty(step.singles * key_heads * room_size, dtype=torch.float32)
    sinks = None if kind.sinks_H is None else kind.sinks_H.float().contiguous()
    compiled(
        "recall", query.dtype, query, query.stride(2), query.stride(1), step.at_R, step.length_R, step.singles, heads,
        keys, values, step.table_RP, step.table_RP.shape[1], step.pool.page, key_heads, keys.shape[3], values.shape[3],
        kind.window or 0, kind.scale, kind.cap or 0.0, sinks, room, room_size, out,
    )  # fmt: skip


def _span(query: Tensor, keys: Tensor, values: Tensor, step: Step, span: Span, kind: Kind, out: Tensor) -> None:
    size = span.stop - span.start
    keys_1KMD, values_1KMD = (_gathered(pages, span.pages[None])[:, :, : span.stop] for pages in (keys, values))
    made = _weighed(
        query[:, :, span.at : span.at + size], keys_1KMD, values_1KMD, step.seen_QM(span, kind.window), kind
    )
    out[:, span.at : span.at + size] = made.transpose(1, 2)


def _gathered(pages: Tensor, table_RP: Tensor) -> Tensor:
    """Keys or values [R, K, M, D] of rows, from the pages [pages, K, page, D] that are theirs."""
    found = pages[table_RP].transpose(1, 2)
    return found.reshape(found.shape[0], found.shape[1], -1, found.shape[4])


def _weighed(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, kind: Kind) -> Tensor:
    """query [R, H, Q, D], key and value [R, K, M, D], `seen` as far as [R, 1, Q, M], None: causal. Returns [R, H, Q, D]."""
    if kind.plain:
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, is_causal=seen is None, scale=kind.scale, enable_gqa=True
        )
    groups = query.shape[1] // key.shape[1]
    scores = (query @ key.repeat_interleave(groups, 1).transpose(-1, -2)).float() * kind.scale
    if kind.cap is not None:
        scores = torch.tanh(scores / kind.cap) * kind.cap
    if seen is None:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    scores = scores.masked_fill(~seen, -torch.inf)
    if kind.sinks_H is not None:
        sinks = kind.sinks_H.float()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
    weights = torch.softmax(scores, -1)[..., : key.shape[2]]
    return weights.to(value.dtype) @ value.repeat_interleave(groups, 1)


def install(model: Any) -> bool:
    """Makes the model's layers call `attend`. Returns whether the model lets its attention be chosen."""
    if NAME not in AttentionInterface().valid_keys():
        AttentionInterface.register(NAME, attend)
    try:
        model.set_attn_implementation(NAME)
    except (ValueError, AttributeError, ImportError):
        return False
    return bool(model.config._attn_implementation == NAME)
