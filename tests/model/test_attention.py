"""Attention over trees: every backend that runs here gives what a dense mask over the row gives, forward and backward."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tunedock.data.layout import Tree
from tunedock.model.attention import RowAttention, attend
from tunedock.model.blocks import GRANULE, blocks, tile, width_of
from tunedock.model.kernels import kernels, status
from tunedock.model.segment_attention import segment_attention, weighed_attention


@st.composite
def rows(draw: st.DrawFn, longest: int = 20) -> tuple[Tree, Tensor]:
    """A random forest in depth-first order, with the positions of its tokens."""
    lengths = draw(st.lists(st.integers(1, longest), min_size=1, max_size=7))
    parents, open_ = [-1], [0]
    for index in range(1, len(lengths)):
        del open_[draw(st.integers(0, len(open_))) :]
        parents.append(open_[-1] if open_ else -1)
        open_.append(index)
    end_S = np.cumsum(lengths)
    tree = Tree(end_S - lengths, end_S, np.asarray(parents))
    positions: list[np.ndarray] = []
    for length, parent in zip(lengths, parents, strict=True):
        first = positions[parent][-1] + 1 if parent >= 0 else 0
        positions.append(np.arange(first, first + length))
    return tree, torch.as_tensor(np.concatenate(positions))


def sees(tree: Tree, position_T: Tensor, window: int | None) -> Tensor:
    """[T, T] from the definition: walk from each segment to the root."""
    mask_TT = torch.zeros(len(position_T), len(position_T), dtype=torch.bool)
    for index in range(len(tree)):
        rows_ = slice(int(tree.start_S[index]), int(tree.end_S[index]))
        above = index
        while above >= 0:
            mask_TT[rows_, int(tree.start_S[above]) : int(tree.end_S[above])] = True
            above = int(tree.parent_S[above])
    distance_TT = position_T[:, None] - position_T[None, :]
    return mask_TT & (distance_TT >= 0) & (distance_TT < (window or 1 << 30))


def heads(tokens: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """query [1, 4, T, 8], key and value [1, 2, T, 8] as a model makes them: the heads of a token side by side."""
    torch.manual_seed(tokens)
    return [torch.randn(1, tokens, n, 8).to(dtype).transpose(1, 2).requires_grad_() for n in (4, 2, 2)]


def dense(states: list[Tensor], mask_TT: Tensor, softcap: float | None = None, sinks_H: Tensor | None = None) -> Tensor:
    query, key, value = (s.double() for s in states)
    key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    scores = query @ key.transpose(-1, -2) * 0.3
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask_TT, -torch.inf)
    if sinks_H is not None:
        sinks = sinks_H.double().view(1, -1, 1, 1).expand(1, -1, scores.shape[2], 1)
        scores = torch.cat([scores, sinks], -1)
    return (torch.softmax(scores, -1)[..., : mask_TT.shape[1]] @ value).transpose(1, 2)


def compare(got: Tensor, states: list[Tensor], wanted: Tensor, tolerance: float) -> None:
    up = torch.randn_like(wanted)
    wanted_grads = torch.autograd.grad((wanted * up).sum(), states, retain_graph=True)
    grads = torch.autograd.grad((got.double() * up).sum(), states)
    for one, other in ((got, wanted), *zip(grads, wanted_grads, strict=True)):
        assert (one.double() - other.double()).abs().max().item() <= tolerance * (other.abs().max().item() + 1)


@settings(deadline=None, max_examples=60)
@given(rows(), st.sampled_from([None, 1, 5, 12]))
def test_it_is_attention_to_the_ancestors(row: tuple[Tree, Tensor], window: int | None) -> None:
    tree, position_T = row
    states, mask_TT = heads(len(position_T)), sees(tree, position_T, window)
    attention = RowAttention(tree, position_T)
    assert torch.equal(attention.dense_mask(window), mask_TT)
    got, _ = attend(torch.nn.Module(), *states, None, scaling=0.3, sliding_window=window, row_attention=attention)
    assert attention.calls == 1
    compare(got, states, dense(states, mask_TT), 1e-5)


@settings(deadline=None, max_examples=20)
@given(rows(), st.sampled_from([None, 5]))
def test_soft_caps_and_sinks(row: tuple[Tree, Tensor], window: int | None) -> None:
    tree, position_T = row
    states, mask_TT = heads(len(position_T)), sees(tree, position_T, window)
    options = {"scaling": 0.3, "sliding_window": window, "row_attention": RowAttention(tree, position_T)}
    got, _ = attend(torch.nn.Module(), *states, None, softcap=2.0, **options)
    compare(got, states, dense(states, mask_TT, softcap=2.0), 1e-5)
    sinks_H = torch.randn(4, requires_grad=True)
    got, _ = attend(torch.nn.Module(), *states, None, s_aux=sinks_H, **options)
    compare(got, [*states, sinks_H], dense(states, mask_TT, sinks_H=sinks_H), 1e-5)


@settings(deadline=None, max_examples=40)
@given(rows(), st.integers(1, 70), st.sampled_from([None, 5]))
def test_filler_behind_the_tree_is_seen_by_nothing(row: tuple[Tree, Tensor], filler: int, window: int | None) -> None:
    tree, position_T = row
    tokens = len(position_T)
    states, mask_TT = heads(tokens + filler), sees(tree, position_T, window)
    attention = RowAttention(tree, torch.cat([position_T, position_T.new_zeros(filler)]))
    wanted = dense([s[:, :, :tokens] for s in states], mask_TT)
    options = {"scaling": 0.3, "sliding_window": window, "row_attention": attention}
    for got, near in (
        (attend(torch.nn.Module(), *states, None, **options)[0], 1e-5),
        (attend(torch.nn.Module(), *states, None, softcap=1e6, **options)[0], 1e-4),
        (segment_attention(*states, attention.blocks(window, torch.float32), 0.3).transpose(1, 2), 1e-5),
    ):
        assert not got[:, tokens:].any()
        compare(got[:, :tokens], states, wanted, near)
    seen_TT = attention.dense_mask(window)
    assert torch.equal(seen_TT[:tokens, :tokens], mask_TT)
    assert not seen_TT[:tokens, tokens:].any() and bool(seen_TT.any(1).all())


@settings(deadline=None, max_examples=100)
@given(rows(), st.sampled_from([None, 5]), st.sampled_from([1, 4, 16]))
def test_tiles_hold_their_blocks(row: tuple[Tree, Tensor], window: int | None, granule: int) -> None:
    tree, position_T = row
    tokens = -(-len(position_T) // granule) * granule
    for block in blocks(tree, window, queries=16):
        made = tile(block, tokens, granule)
        assert 0 <= made.start <= block.start and block.end <= made.end <= tokens
        assert (made.end - made.start) % granule == made.columns % granule == 0
        assert sum(end - start for start, end in made.keys) == made.columns
        at = [place for start, end in made.keys for place in range(start, end)]
        assert all(0 <= place < tokens for place in at)
        wanted = [place for start, end in block.keys for place in range(start, end)]
        assert at[made.left : made.left + block.seen] == wanted


def test_few_widths_for_many_lengths() -> None:
    for tokens in range(1, 20_000):
        width = width_of(tokens)
        assert width % GRANULE == 0 and tokens <= width < tokens + max(GRANULE, tokens / 8)
    assert len({width_of(tokens) for tokens in range(1, 20_000)}) < 90


@settings(deadline=None, max_examples=60)
@given(rows(), st.sampled_from([None, 5]), st.sampled_from([3, 16]), st.sampled_from([1, 4, 32]))
def test_both_ways_of_computing_on_the_cpu(
    row: tuple[Tree, Tensor], window: int | None, queries: int, granule: int
) -> None:
    """With the compiled kernel, its rows cut anywhere, and with PyTorch's flash kernel where nothing could be compiled."""
    tree, position_T = row
    states = heads(len(position_T))
    wanted = dense(states, sees(tree, position_T, window))
    attention = RowAttention(tree, position_T)
    flash = segment_attention(*states, attention.blocks(window, torch.float32), 0.3)
    compare(flash.transpose(1, 2), states, wanted, 1e-5)
    compiled = kernels()
    assert compiled is not None, status()
    cut = blocks(tree, window, queries=queries)
    assert all(block.end - block.start <= queries for block in cut)
    filler = -len(position_T) % granule
    padded = [torch.nn.functional.pad(s, (0, 0, 0, filler), value=7.0) for s in states]
    tiles = [tile(block, len(position_T) + filler, granule) for block in cut]
    weighed = weighed_attention(*padded, tiles, window, 0.3, compiled)
    compare(weighed[:, :, : len(position_T)].transpose(1, 2), states, wanted, 1e-5)


def test_bfloat16_is_as_near_as_its_digits_allow() -> None:
    length = 300
    tree = Tree(np.asarray([0, 100, 220]), np.asarray([100, 220, 300]), np.asarray([-1, 0, 0]))
    position_T = torch.cat([torch.arange(220), torch.arange(100, 180)])
    states = heads(length, torch.bfloat16)
    attention = RowAttention(tree, position_T)
    got, _ = attend(torch.nn.Module(), *states, None, scaling=0.3, row_attention=attention)
    assert got.dtype == torch.bfloat16
    compare(got, states, dense(states, sees(tree, position_T, None)), 2e-2)


def test_without_a_row_it_refuses() -> None:
    with pytest.raises(RuntimeError, match="no row came along"):
        attend(torch.nn.Module(), *heads(3), None)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("plain", [True, False])
def test_the_gpu_backends(plain: bool, window: int | None) -> None:
    """Documents side by side go to varlen attention, trees to FlexAttention."""
    parents = [-1, -1, -1] if plain else [-1, 0, 0]
    tree = Tree(np.asarray([0, 100, 220]), np.asarray([100, 220, 300]), np.asarray(parents))
    spans = (100, 120, 80)
    starts = (0, 0, 0) if plain else (0, 100, 100)
    position_T = torch.cat([torch.arange(s, s + n) for s, n in zip(starts, spans, strict=True)]).cuda()
    torch.manual_seed(0)
    states = [
        torch.randn(1, 300, n, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
        for n in (4, 2, 2)
    ]
    row = RowAttention(tree, position_T)
    got, _ = attend(torch.nn.Module(), *states, None, scaling=0.3, sliding_window=window, row_attention=row)
    compare(got, states, dense(states, sees(tree, position_T.cpu(), window).cuda()), 2e-2)
