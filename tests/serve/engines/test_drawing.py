"""The next token of a row, held against transformers' own processors and against the shares it is drawn by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tunedock.serve.engines import drawing, drawing_numpy
from tunedock.serve.engines.generator import Sampling
from tunedock.serve.engines.steps import Drawer, Drawn

KINDS = [
    {"temperature": 0.7},
    {"temperature": 1.0, "top_p": 0.6},
    {"temperature": 1.4, "top_k": 7},
    {"temperature": 1.2, "top_k": 9, "top_p": 0.7, "min_p": 0.05},
    {"temperature": 0.9, "min_p": 0.1},
    {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.8},
    {"temperature": 1.0, "top_p": 0.01},
    {"temperature": 1.0, "top_k": 1},
]


Draw = Callable[..., list[Drawn | None]]
WAYS = {"torch": drawing, "numpy": drawing_numpy}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> ModuleType:
    return WAYS[request.param]


@pytest.fixture
def draw(way: ModuleType) -> Draw:
    """Of tensors, whichever way draws."""
    if way is drawing:
        return drawing.draw
    return lambda logits, drawers, told: drawing_numpy.draw(logits.numpy(), drawers, told)


def shares_by_transformers(logits: torch.Tensor, prompt: list[int], kind: dict[str, Any]) -> torch.Tensor:
    steps: list[Any] = [TemperatureLogitsWarper(kind["temperature"])]
    if "repetition_penalty" in kind:
        steps.insert(0, RepetitionPenaltyLogitsProcessor(kind["repetition_penalty"]))
    steps += [TopKLogitsWarper(kind["top_k"])] if "top_k" in kind else []
    steps += [TopPLogitsWarper(kind["top_p"])] if "top_p" in kind else []
    steps += [MinPLogitsWarper(kind["min_p"])] if "min_p" in kind else []
    return torch.softmax(LogitsProcessorList(steps)(torch.tensor([prompt]), logits[None].clone())[0], -1)


@pytest.mark.parametrize("candidates", [1024, 4])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_tokens_come_by_the_shares_transformers_gives_them(
    kind: dict[str, Any], candidates: int, way: ModuleType, draw: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers on a fine grid, in the place of random ones: each token must come as often as its share says."""
    monkeypatch.setattr(way, "CANDIDATES", candidates)
    logits = torch.randn(40, generator=torch.Generator().manual_seed(3)) * 2.0
    wanted = shares_by_transformers(logits, [4, 5, 5, 30], kind)
    grid = 4000
    drawer = Drawer(Sampling(**kind), [4, 5, 5, 30])
    numbers = iter((i + 0.5) / grid for i in range(grid))
    monkeypatch.setattr(drawer, "next_number", lambda: next(numbers))
    monkeypatch.setattr(drawer, "took", lambda token: None)
    counts = Counter(made.id for _ in range(grid) for made in draw(logits[None], [drawer], [None]) if made)
    got = torch.tensor([counts[token] / grid for token in range(40)])
    assert (got - wanted).abs().max() <= 2 / grid
    assert {t for t in range(40) if counts[t]} <= set(wanted.nonzero()[:, 0].tolist())


def test_presence_and_frequency(draw: Draw) -> None:
    drawer = Drawer(Sampling(temperature=0.0, presence_penalty=0.5, frequency_penalty=0.25), [0, 0, 0])
    logits = torch.tensor([[0.0, 2.0, 1.4, 1.05]])
    given = logits.clone()
    # Token 1: 2.0, 1.25, 1.0, 0.75, 0.5; what the prompt holds is not counted.
    assert [draw(logits, [drawer], [None])[0].id for _ in range(7)] == [1, 2, 1, 3, 1, 1, 2]  # type: ignore[union-attr]
    assert torch.equal(logits, given), "penalties leave the logits alone"


def test_a_row_does_not_look_at_others(draw: Draw) -> None:
    draws = torch.randn(5, 3000, generator=torch.Generator().manual_seed(1)) * 3
    settings = [
        Sampling(temperature=0.0),
        Sampling(temperature=1.0, seed=1),
        Sampling(temperature=1.0, top_p=0.9, seed=2),
        Sampling(temperature=1.0, top_k=50, seed=3),
        Sampling(temperature=1.0, min_p=0.1, seed=4),
    ]

    def drawers() -> list[Drawer]:
        return [Drawer(each, [1]) for each in settings]

    together = [made.id for made in draw(draws, drawers(), [0] * 5) if made]
    alone = [draw(draws[i : i + 1], [drawer], [0])[0].id for i, drawer in enumerate(drawers())]  # type: ignore[union-attr]
    assert together == alone


def test_likelihoods_are_those_before_any_setting(draw: Draw) -> None:
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(1))
    drawers = [Drawer(Sampling(temperature=3.0, top_k=2, repetition_penalty=4.0), [1]), Drawer(Sampling(), [1])]
    first, second = draw(logits, drawers, [4, None])
    wanted = torch.log_softmax(logits[0], -1)
    assert first is not None and second is not None
    assert first.logprob == pytest.approx(float(wanted[first.id]))
    assert [value for _, value in first.alternatives] == pytest.approx(wanted.topk(4).values.tolist())
    assert second.logprob is None and second.alternatives == ()


def test_no_numbers(draw: Draw) -> None:
    logits = torch.zeros(2, 10)
    logits[1, 3] = float("nan")
    made = draw(logits, [Drawer(Sampling(), [1]), Drawer(Sampling(), [1])], [None, None])
    assert made[0] is not None and made[1] is None


def test_the_largest_number_draws_a_token_that_may_be_drawn(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.tensor([[0.0, 1.0, float("-inf"), float("-inf")]])
    for kind in (Sampling(), Sampling(top_p=0.99), Sampling(min_p=0.5)):
        drawer = Drawer(kind, [1])
        monkeypatch.setattr(drawer, "next_number", lambda: 1.0 - 2**-53)
        made = draw(logits, [drawer], [None])[0]
        assert made is not None and made.id in (0, 1)


def test_both_ways_draw_the_same_tokens() -> None:
    """A seed gives an answer, whichever way computes it: sums differ by rounding, which a number of chance all but never meets."""
    logits = torch.randn(300, 5000, generator=torch.Generator().manual_seed(2)) * 3
    for kind in KINDS:
        ways = [
            [
                made and (made.id, [one for one, _ in made.alternatives])
                for made in draw(given, drawers, [3] * len(logits))
            ]
            for draw, given in ((drawing.draw, logits), (drawing_numpy.draw, logits.numpy()))
            for drawers in [[Drawer(Sampling(**kind, seed=seed), [1, 2, 3]) for seed in range(len(logits))]]
        ]
        assert ways[0] == ways[1], kind
