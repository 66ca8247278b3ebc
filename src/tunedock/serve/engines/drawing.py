"""Logits -> the next token of each row, with PyTorch, on any device (`drawing_numpy`: without).

What a row draws depends on its own logits, settings and seed alone, never on its company.

The order is that of transformers' `generate`: penalties, temperature, top_k, top_p, min_p; and of the tokens that are left one is
drawn by one number of the request's own generator. Likelihoods that are told are the model's, before any of this.

Shapes: R rows, V tokens of the vocabulary, C candidates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tunedock.serve.engines.generator import Sampling
from tunedock.serve.engines.steps import CANDIDATES, Drawer, Drawn


def draw(logits_RV: Tensor, drawers: Sequence[Drawer], top_logprobs: Sequence[int | None]) -> list[Drawn | None]:
    """The next token of each row, whose generator goes on by one number. None where the model gave no numbers (NaN)."""
    logits_RV = logits_RV.float()
    told = _likelihoods(logits_RV, top_logprobs)
    sound = (~logits_RV.isnan().any(-1)).tolist()
    if any(drawer.penalised for drawer in drawers):
        logits_RV = logits_RV.clone()
        for line, drawer in enumerate(drawers):
            if drawer.penalised:
                _penalise(logits_RV[line], drawer)
    ids: dict[int, int] = {}
    greedy = [line for line, drawer in enumerate(drawers) if drawer.greedy]
    if greedy:
        ids |= zip(greedy, _lines(logits_RV, greedy).argmax(-1).tolist(), strict=True)
    free = [line for line, drawer in enumerate(drawers) if not drawer.greedy and not drawer.cuts and sound[line]]
    if free:
        ids |= zip(free, _drawn_freely(_lines(logits_RV, free), [drawers[line] for line in free]), strict=True)
    cut = [line for line, drawer in enumerate(drawers) if not drawer.greedy and drawer.cuts and sound[line]]
    if cut:
        ids |= zip(cut, _drawn_of_few(_lines(logits_RV, cut), [drawers[line] for line in cut]), strict=True)
    made: list[Drawn | None] = []
    for line, drawer in enumerate(drawers):
        if not sound[line]:
            made.append(None)
            continue
        drawer.took(ids[line])
        made.append(_with_likelihoods(ids[line], top_logprobs[line], told.get(line)))
    return made


def _penalise(logits_V: Tensor, drawer: Drawer) -> None:
    """In place."""
    s, seen, counts = drawer.sampling, drawer.seen(), drawer.counts()
    if seen:
        index = torch.tensor(seen, device=logits_V.device)
        found = logits_V[index]
        logits_V[index] = torch.where(found < 0, found * s.repetition_penalty, found / s.repetition_penalty)
    if counts:
        index = torch.tensor(list(counts), device=logits_V.device)
        times = torch.tensor(list(counts.values()), dtype=logits_V.dtype, device=logits_V.device)
        logits_V[index] -= s.presence_penalty + s.frequency_penalty * times


def _lines(x_RV: Tensor, lines: Sequence[int]) -> Tensor:
    return x_RV if len(lines) == len(x_RV) else x_RV[list(lines)]


def _likelihoods(logits_RV: Tensor, wanted: Sequence[int | None]) -> dict[int, Tensor]:
    """Log-probabilities [V] of the rows that tell them."""
    lines = [line for line, number in enumerate(wanted) if number is not None]
    if not lines:
        return {}
    return dict(zip(lines, torch.log_softmax(_lines(logits_RV, lines), -1), strict=True))


def _with_likelihoods(token: int, alternatives: int | None, logprob_V: Tensor | None) -> Drawn:
    if logprob_V is None:
        return Drawn(token)
    ranked = logprob_V.topk(min(alternatives or 0, len(logprob_V)))
    pairs = zip(ranked.indices.tolist(), ranked.values.tolist(), strict=True)
    return Drawn(token, float(logprob_V[token]), tuple(pairs))


def _scaled(logits_RV: Tensor, drawers: Sequence[Drawer]) -> Tensor:
    temperatures = torch.tensor([drawer.sampling.temperature for drawer in drawers], device=logits_RV.device)
    return logits_RV / temperatures[:, None]


def _drawn_freely(logits_RV: Tensor, drawers: Sequence[Drawer]) -> list[int]:
    """Of the whole vocabulary, but for `min_p`."""
    share_RV = torch.softmax(_scaled(logits_RV, drawers), -1)
    return _picked(_above_min_p(share_RV, drawers), drawers).tolist()


def _drawn_of_few(logits_RV: Tensor, drawers: Sequence[Drawer]) -> list[int]:
    """Of the most likely tokens, as far as `top_k` and `top_p` go."""
    scaled_RV = _scaled(logits_RV, drawers)
    vocabulary = scaled_RV.shape[1]
    total_R = scaled_RV.logsumexp(-1, keepdim=True)
    ids: list[int] = []
    width = min(CANDIDATES, vocabulary)
    best = scaled_RV.topk(width)
    share_RC = (best.values - total_R).exp()
    enough = [_are_enough(share_C, drawer, vocabulary) for share_C, drawer in zip(share_RC, drawers, strict=True)]
    for line, drawer in enumerate(drawers):
        order, share_C = best.indices[line], share_RC[line]
        if not enough[line]:
            ranked = scaled_RV[line].sort(descending=True)
            order, share_C = ranked.indices, (ranked.values - total_R[line]).exp()
        kept_C = _above_min_p(_cut(share_C, drawer.sampling)[None], [drawer])
        ids.append(int(order[_picked(kept_C, [drawer])[0]]))
    return ids


def _are_enough(share_C: Tensor, drawer: Drawer, vocabulary: int) -> bool:
    top_k = drawer.sampling.top_k
    if len(share_C) == vocabulary or (top_k and top_k <= len(share_C)):
        return True
    return not top_k and float(share_C.sum()) > drawer.sampling.top_p


def _cut(share_C: Tensor, sampling: Sampling) -> Tensor:
    """Shares, the largest first, with zeros for those that may not be drawn: `top_k`, then `top_p` of what that leaves."""
    if sampling.top_k:
        share_C = share_C[: sampling.top_k]
        share_C = share_C / share_C.sum()
    if sampling.top_p < 1.0:
        before_C = share_C.cumsum(-1) - share_C
        kept_C = before_C < sampling.top_p
        kept_C[0] = True
        share_C = share_C * kept_C
    return share_C


def _above_min_p(share_RC: Tensor, drawers: Sequence[Drawer]) -> Tensor:
    least = [drawer.sampling.min_p for drawer in drawers]
    if not any(least):
        return share_RC
    least_R1 = torch.tensor(least, device=share_RC.device)[:, None] * share_RC.amax(-1, keepdim=True)
    return share_RC * (share_RC >= least_R1)


def _picked(share_RC: Tensor, drawers: Sequence[Drawer]) -> Tensor:
    """An index [R] of each row, drawn by its shares, which need not sum to one."""
    sums_RC = share_RC.cumsum(-1)
    numbers = torch.tensor([drawer.next_number() for drawer in drawers], device=share_RC.device)
    wanted_R1 = numbers[:, None] * sums_RC[:, -1:]
    # The first whose sum is above: one of share zero, whose sum is that of the one before, is never it.
    picked_R = torch.searchsorted(sums_RC, wanted_R1, right=True)[:, 0]
    last_R = (share_RC > 0).int().mul(torch.arange(share_RC.shape[1], device=share_RC.device)).amax(-1)
    return torch.minimum(picked_R, last_R)
