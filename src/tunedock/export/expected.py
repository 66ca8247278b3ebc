"""What a run's model does: the yardstick for everything that is made of it.

Measured once, in float32, on base plus adapter as they were trained, before anything is merged, rounded or written. What it does
with the package's own probes travels with an export (`expected.json`), so that the files can be tried wherever they are; what it
does with the run's held-out rows does not leave the run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from torch import nn

from tunedock.data import prepare as preparing
from tunedock.data.store import SampleStore
from tunedock.errors import CheckError, DataError
from tunedock.eval.questions import questions_of
from tunedock.events import Emitter
from tunedock.export.probes import DOCUMENTS, TALKS, TEXTS
from tunedock.model.chat_facts import ChatFacts
from tunedock.model.session import Base
from tunedock.run.record import read_json, write_json

EXPECTED = "expected.json"
TOKENS = 24
"""Of each answer, unless it ends before."""
PROMPTS, ROWS, ROW_TOKENS = 8, 32, 512
"""Of the held-out rows: answers, rows whose likelihood is measured, and at most so many tokens of each."""


@dataclass(frozen=True, slots=True)
class Answer:
    prompt: list[int]
    tokens: list[int]
    """The most likely one each time."""
    gaps: list[float]
    """By how much the logit of each was above the next, relative to the largest logit: below rounding it is a tie."""


@dataclass(frozen=True, slots=True)
class Expected:
    texts: dict[str, list[int]]
    """Ids of the texts of `probes.TEXTS`, by name; nothing is put around them."""
    talks: dict[str, list[int]]
    """Ids of the prompts of `probes.TALKS` that the template takes, as training has them."""
    answers: dict[str, Answer]
    nll: dict[str, list[float]]
    """Of each answer with its prompt: negative log-likelihoods (nats) of all tokens but the first."""
    stop_ids: list[int]
    thinking: bool
    made_nll: dict[str, list[float]] | None = None
    """The same of the files, as they were when they were made: what they must still give, to the rounding of a machine."""

    def write(self, folder: Path) -> None:
        write_json(folder / EXPECTED, TypeAdapter(Expected).dump_python(self))

    @classmethod
    def read(cls, folder: Path) -> Expected:
        """Raises CheckError for what is not such a file, RunError where it is missing."""
        try:
            return TypeAdapter(Expected).validate_python(read_json(folder / EXPECTED))
        except ValidationError as error:
            reason = error.errors()[0]
            raise CheckError(
                f"it is not what an export writes: {reason['msg']}", where=str(folder / EXPECTED), hint="export again"
            ) from None


@dataclass(frozen=True, slots=True)
class Row:
    """A held-out sample: its tokens, and which of them count."""

    ids: list[int]
    counts: list[bool]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What is known of the run's own rows."""

    answers: dict[str, Answer] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    nll: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    """Negative log-likelihoods (nats) of all counting tokens, in the rows' order."""


def expected_of(base: Base, facts: ChatFacts, model: nn.Module, device: torch.device) -> Expected:
    """Measured on the run's model."""
    texts = {name: base.tokenizer(text, add_special_tokens=False)["input_ids"] for name, text in TEXTS.items()}
    talks = {} if base.chat.documents else _prompts_of_talks(base, facts)
    stops = set(facts.stop_ids)
    prompts = talks or {name: base.tokenizer(TEXTS[name])["input_ids"] for name in DOCUMENTS}
    answers = {name: answer_of(model, ids, device, stops) for name, ids in prompts.items()}
    nll = {name: nll_of(model, [*one.prompt, *one.tokens], device).tolist() for name, one in answers.items()}
    return Expected(texts, talks, answers, nll, sorted(stops), facts.thinking)


def held_out_of(base: Base, facts: ChatFacts, model: nn.Module, device: torch.device, emit: Emitter) -> HeldOut:
    """Measured on the run's model. A stream's rows are gone, so nothing is known of them."""
    if base.recipe.data.streaming:
        return HeldOut()
    prepared = preparing.prepare(base.recipe, base.chat, emit)
    store: SampleStore = next(side for name in ("test", "validation", "train") if len(side := prepared.side(name)))
    rows = [_row(store, i) for i in range(min(ROWS, len(store)))]
    rows = [row for row in rows if any(row.counts[1:])]
    questions = [] if base.chat.documents else questions_of(store, PROMPTS)
    prompts = {
        f"held-out {i}": base.chat.prompt_ids(q.prompt, q.tools, thinking=facts.thinking)
        for i, q in enumerate(questions)
    }
    if not prompts:
        prompts = {f"held-out {i}": row.ids[: max(1, len(row.ids) // 2)] for i, row in enumerate(islice(rows, PROMPTS))}
    answers = {name: answer_of(model, ids, device, set(facts.stop_ids)) for name, ids in prompts.items()}
    return HeldOut(answers, rows, counting(rows, lambda ids: nll_of(model, ids, device)))


def counting(rows: Sequence[Row], nll: Callable[[Sequence[int]], NDArray[np.float64]]) -> NDArray[np.float64]:
    """Negative log-likelihoods of the rows' counting tokens; `nll` gives those [T - 1] of a row's tokens but the first."""
    return np.concatenate([np.zeros(0), *(nll(row.ids)[np.array(row.counts[1:], dtype=bool)] for row in rows)])


@torch.no_grad()
def answer_of(model: nn.Module, prompt: Sequence[int], device: torch.device, stops: Collection[int]) -> Answer:
    """The most likely continuation, token by token, up to a stop token or TOKENS of them."""
    model.eval()
    tokens: list[int] = []
    gaps: list[float] = []
    past, ids = None, list(prompt)
    while len(tokens) < TOKENS and not (tokens and tokens[-1] in stops):
        out = model(torch.tensor([ids], device=device), past_key_values=past, use_cache=True)
        token, gap = most_likely(out.logits[0, -1].float().cpu().numpy())
        tokens.append(token)
        gaps.append(gap)
        past, ids = out.past_key_values, [token]
    return Answer(list(prompt), tokens, gaps)


@torch.no_grad()
def nll_of(model: nn.Module, ids: Sequence[int], device: torch.device) -> NDArray[np.float64]:
    """Negative log-likelihoods (nats) [T - 1] of all tokens but the first."""
    model.eval()
    logits_TV = model(torch.tensor([list(ids)], device=device), use_cache=False).logits[0, :-1].float()
    chosen_T = torch.tensor(list(ids[1:]), device=logits_TV.device)
    return nn.functional.cross_entropy(logits_TV, chosen_T, reduction="none").double().cpu().numpy()


def most_likely(logits_V: NDArray[np.float32]) -> tuple[int, float]:
    """(the token, by how much it is above the next, relative to the largest logit)."""
    first, second = np.argsort(logits_V)[::-1][:2]
    gap = float(logits_V[first] - logits_V[second]) / max(float(np.abs(logits_V).max()), 1e-6)
    return int(first), gap


def _row(store: SampleStore, i: int) -> Row:
    sample = store[i]
    ids, weights = sample.path(sample.leaves()[0])
    return Row(ids[:ROW_TOKENS].tolist(), [bool(weight) for weight in weights[:ROW_TOKENS].tolist()])


def _prompts_of_talks(base: Base, facts: ChatFacts) -> dict[str, list[int]]:
    found = {}
    for name, talk in TALKS.items():
        try:
            found[name] = base.chat.prompt_ids(talk.messages, talk.tools, thinking=facts.thinking)
        except DataError:  # the template has no such role
            continue
    return found
