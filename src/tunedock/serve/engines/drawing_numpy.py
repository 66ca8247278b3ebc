"""Logits -> the next token of each row, without PyTorch: what `drawing` does, row by row, for what llama.cpp computes.

The same order (penalties, temperature, top_k, top_p, min_p), the same numbers of a request's generator; sums are in float64.

Shapes: R rows, V tokens of the vocabulary, C candidates.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tunedock.serve.engines.generator import Sampling
from tunedock.serve.engines.steps import CANDIDATES, Drawer, Drawn

Floats = NDArray[np.float32]
Shares = NDArray[np.float64]


def draw(logits_RV: Floats, drawers: Sequence[Drawer], top_logprobs: Sequence[int | None]) -> list[Drawn | None]:
    """As `drawing.draw`."""
    return [_draw(*row) for row in zip(logits_RV, drawers, top_logprobs, strict=True)]


def _draw(logits_V: Floats, drawer: Drawer, top_logprobs: int | None) -> Drawn | None:
    if np.isnan(logits_V).any():
        return None
    changed_V = _penalised(logits_V, drawer) if drawer.penalised else logits_V
    if drawer.greedy:
        token = int(changed_V.argmax())
    elif drawer.cuts:
        token = _drawn_of_few(changed_V, drawer)
    else:
        token = _picked(_above_min_p(_shares(changed_V / drawer.sampling.temperature), drawer), drawer)
    drawer.took(token)
    return _with_likelihoods(token, top_logprobs, logits_V)


def _penalised(logits_V: Floats, drawer: Drawer) -> Floats:
    s, seen, counts = drawer.sampling, drawer.seen(), drawer.counts()
    changed_V = logits_V.copy()
    if seen:
        found = changed_V[seen]
        changed_V[seen] = np.where(found < 0, found * s.repetition_penalty, found / s.repetition_penalty)
    if counts:
        times = np.array(list(counts.values()), dtype=np.float32)
        changed_V[list(counts)] -= s.presence_penalty + s.frequency_penalty * times
    return changed_V


def _with_likelihoods(token: int, alternatives: int | None, logits_V: Floats) -> Drawn:
    if alternatives is None:
        return Drawn(token)
    logprob_V = logits_V - _log_of_sum(logits_V)
    ids = _most_likely(logprob_V, min(alternatives, len(logprob_V)))
    return Drawn(token, float(logprob_V[token]), tuple((int(one), float(logprob_V[one])) for one in ids))


def _log_of_sum(x_V: Floats) -> float:
    top = float(x_V.max())
    return top + float(np.log(np.exp(x_V - top).sum(dtype=np.float64)))


def _shares(x_V: Floats) -> Shares:
    raised_V = np.exp(x_V - x_V.max(), dtype=np.float64)
    shares_V: Shares = raised_V / raised_V.sum()
    return shares_V


def _most_likely(x_V: Floats, number: int) -> NDArray[np.int64]:
    """Indices [C], the largest first; of equals the one that stands first."""
    if number == 0:
        return np.empty(0, dtype=np.int64)
    some = np.argpartition(-x_V, number - 1)[:number] if number < len(x_V) else np.arange(len(x_V))
    return some[np.lexsort((some, -x_V[some]))]


def _drawn_of_few(logits_V: Floats, drawer: Drawer) -> int:
    """Of the most likely tokens, as far as `top_k` and `top_p` go."""
    scaled_V = logits_V / drawer.sampling.temperature
    total = _log_of_sum(scaled_V)
    width = min(CANDIDATES, len(scaled_V))
    order_C = _most_likely(scaled_V, width)
    share_C = np.exp(scaled_V[order_C] - total, dtype=np.float64)
    if not _are_enough(share_C, drawer.sampling, len(scaled_V)):
        order_C = _most_likely(scaled_V, len(scaled_V))
        share_C = np.exp(scaled_V[order_C] - total, dtype=np.float64)
    return int(order_C[_picked(_above_min_p(_cut(share_C, drawer.sampling), drawer), drawer)])


def _are_enough(share_C: Shares, sampling: Sampling, vocabulary: int) -> bool:
    if len(share_C) == vocabulary or (sampling.top_k and sampling.top_k <= len(share_C)):
        return True
    return not sampling.top_k and float(share_C.sum()) > sampling.top_p


def _cut(share_C: Shares, sampling: Sampling) -> Shares:
    """Shares, the largest first, with zeros for those that may not be drawn: `top_k`, then `top_p` of what that leaves."""
    if sampling.top_k:
        share_C = share_C[: sampling.top_k]
        share_C = share_C / share_C.sum()
    if sampling.top_p < 1.0:
        kept_C = share_C.cumsum() - share_C < sampling.top_p
        kept_C[0] = True
        share_C = share_C * kept_C
    return share_C


def _above_min_p(share_C: Shares, drawer: Drawer) -> Shares:
    least = drawer.sampling.min_p
    return share_C * (share_C >= least * share_C.max()) if least else share_C


def _picked(share_C: Shares, drawer: Drawer) -> int:
    """An index, drawn by the shares, which need not sum to one."""
    sums_C = share_C.cumsum()
    picked = int(np.searchsorted(sums_C, drawer.next_number() * sums_C[-1], side="right"))
    return min(picked, int(np.flatnonzero(share_C)[-1]))
