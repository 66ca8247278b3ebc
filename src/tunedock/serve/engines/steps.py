"""What an engine of this process computes with, whatever that is: a step's works -> logits of the rows that draw -> a token each.

No PyTorch here, nor in `batching` and `schedule`: llama.cpp computes without it, and images that hold llama.cpp alone have none.

Shapes: R rows that draw, V tokens of the vocabulary.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from tunedock.serve.engines.generator import Sampling
from tunedock.serve.engines.schedule import Work

PAGE = 32
"""Tokens of a page."""

CANDIDATES = 1024
"""Most likely tokens among which `top_p` and `top_k` are looked for first: sorting a whole vocabulary takes ten times as long."""


class Drawer:
    """One request's way of drawing."""

    def __init__(self, sampling: Sampling, prompt: Collection[int]) -> None:
        self.sampling = sampling
        self._random = random.Random(sampling.seed)
        self._prompt = set(prompt) if sampling.repetition_penalty != 1.0 else set()
        self._drawn: Counter[int] = Counter()

    @property
    def greedy(self) -> bool:
        return self.sampling.temperature <= 0.0

    @property
    def penalised(self) -> bool:
        s = self.sampling
        return s.repetition_penalty != 1.0 or s.presence_penalty != 0.0 or s.frequency_penalty != 0.0

    @property
    def cuts(self) -> bool:
        """Whether only some of the most likely tokens may be drawn. `min_p` needs no order to be found."""
        return bool(self.sampling.top_k) or self.sampling.top_p < 1.0

    def next_number(self) -> float:
        """In [0, 1): one a token, so that a seed gives the same tokens wherever the request was interrupted."""
        return self._random.random()

    def took(self, token: int) -> None:
        if self.penalised:
            self._drawn[token] += 1

    def seen(self) -> list[int]:
        """Tokens of prompt and answer, where repeating them is penalised (arXiv 1909.05858)."""
        return sorted(self._prompt | self._drawn.keys()) if self.sampling.repetition_penalty != 1.0 else []

    def counts(self) -> Counter[int]:
        """Tokens of the answer, where presence and frequency are penalised, as OpenAI has them."""
        return self._drawn if self.sampling.presence_penalty or self.sampling.frequency_penalty else Counter()


@dataclass(frozen=True, slots=True)
class Drawn:
    id: int
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()


class Adapter(Protocol):
    """What a request holds of an adapter: weights that never change."""

    @property
    def name(self) -> str: ...


A = TypeVar("A", bound=Adapter)
L = TypeVar("L")
"""Logits [R, V], as what computes has them."""


class Compute(Protocol[A, L]):
    """Called by one thread at a time; adapters are read beside it."""

    whole_prompts: bool
    """Whether a prompt must be computed in one piece."""
    turn: int | None
    """Tokens beyond which a row's keys are others: one that grows past it is computed again from its beginning. None without such
    a length."""
    vocabulary: int
    bytes_per_token: int
    notes: list[str]

    def reserve(self, pages: int, page: int) -> None:
        """Room for keys and values; before the first step."""
        ...

    def computing(self) -> AbstractContextManager[object]:
        """Around all steps, in the thread that computes."""
        ...

    def step(self, works: Sequence[Work], loras: Sequence[A | None]) -> L:
        """Logits of the works that draw, in their order. `loras`: of each work, those of one side by side."""
        ...

    def draw(self, logits: L, drawers: Sequence[Drawer], told: Sequence[int | None]) -> list[Drawn | None]:
        """The next token of each row, whose generator goes on by one number. None where the model gave no numbers (NaN).
        `told`: alternatives whose likelihoods are told, None for none, not even the token's own."""
        ...

    def ran_out(self, error: BaseException) -> bool:
        """Whether a step failed for want of memory, and may do with fewer rows."""
        ...

    def give_back(self) -> None:
        """Frees what is kept for reuse, after that."""
        ...

    def leave(self, slots: Sequence[int]) -> None:
        """These slots' rows are gone."""
        ...

    def read_adapter(self, name: str, folder: Path) -> A: ...

    def close(self) -> None:
        """Gives everything back; after the last step."""
        ...
