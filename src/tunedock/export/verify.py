"""An export held against what the run's model does, through the eyes of those who will deploy it.

    tokens      every probe text has the ids it had in training
    prompts     a server's rendering of every probe conversation has the ids training gave it
    answers     the most likely continuation of every prompt, token by token; where the run's model was as good as undecided between
                two tokens (a gap below rounding), the other one is a tie, not a fault
    weights     the likelihood of every probe, token by token
    likelihood  the perplexity of the run's held-out rows, where the run is at hand
    ends        every token that ended an answer in training ends it there

What files of the weights as they are (hf, f32, bf16, f16) must have all of; quantised ones have answers and likelihood reported,
and the likelihood held to a limit.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from tunedock.errors import CheckError
from tunedock.export.expected import Answer, Expected, HeldOut, counting
from tunedock.export.probes import TALKS, TEXTS
from tunedock.export.readers import Reader

TIE = 0.02
"""Gap between the two best logits, relative to the largest, below which rounding may turn them round."""
STILL = 0.01
"""Nats a token's likelihood may differ from what the same files gave before, on another machine."""
ROUNDED = 0.2
"""The same between files of rounded weights and the run's model."""
CERTAIN = 3.0
"""Standard errors by which a perplexity must be off to count."""
NAMED = 4
"""Differences that a report spells out, of each kind."""
LIMITS: Mapping[str, float] = {
    "f32": 0.005, "f16": 0.005, "bf16": 0.02, "as trained": 0.02,
    "int8": 0.03, "int4": 0.15, "nf4": 0.15, "gptq": 0.15, "awq": 0.15,
    "q8": 0.02, "q6": 0.03, "q5": 0.05, "q4": 0.15, "q3": 0.4, "q2": 1.0,
}  # fmt: skip
"""Largest relative change of the perplexity, by the kind of file, or the beginning of its name."""


@dataclass(slots=True)
class Report:
    """What came of it. `problems` are what makes an export no export."""

    kind: str
    exact: bool
    texts: int = 0
    same_texts: int = 0
    prompts: int = 0
    same_prompts: int = 0
    answers: int = 0
    same_answers: int = 0
    """Word for word; those that part at a tie are not among them."""
    ties: int = 0
    tokens: int = 0
    same_tokens: int = 0
    """Up to where each answer parts from the run's."""
    nll: dict[str, list[float]] = field(default_factory=dict)
    nll_difference: float | None = None
    """Mean difference (nats) of a token's likelihood in the probes, from the run's or, tried again, from when it was made."""
    perplexity_run: float | None = None
    perplexity: float | None = None
    perplexity_change: float | None = None
    """Relative."""
    perplexity_error: float | None = None
    """Of the change, a standard error."""
    limit: float | None = None
    load_s: float | None = None
    tokens_per_s: float | None = None
    bytes: int | None = None
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)
    """Checks that could not be made here, and why."""

    def to_json(self) -> dict[str, Any]:
        """Without the likelihoods one by one."""
        return {name: value for name, value in asdict(self).items() if name != "nll"}

    def judge(self, where: str) -> None:
        """Raises CheckError where there are problems."""
        if self.problems:
            raise CheckError(
                "; ".join(self.problems),
                where=where,
                hint="what would be deployed is not what was trained; a quantised file's limit is --max-perplexity-change",
            )


def limit_of(kind: str) -> float:
    """The usual limit of a kind of file (`q4_k_m`, `int8`, `bf16`)."""
    found = [name for name in LIMITS if kind.startswith(name)]
    return LIMITS[max(found, key=len)]


def verify(reader: Reader, expected: Expected, held: HeldOut, *, kind: str, exact: bool, limit: float | None) -> Report:
    """Asks an export everything that is expected of it."""
    report = Report(kind, exact, load_s=reader.load_s)
    _texts(reader, expected, report)
    _prompts(reader, expected, report)
    _ends(reader, expected, report)
    _weights(reader, expected, report)
    _answers(reader, {**expected.answers, **held.answers}, expected.stop_ids, report)
    _likelihood(reader, held, limit_of(kind) if limit is None else limit, report)
    return report


def _texts(reader: Reader, expected: Expected, report: Report) -> None:
    report.texts = len(expected.texts)
    wrong = [name for name, ids in expected.texts.items() if name in TEXTS and reader.tokens(TEXTS[name]) != ids]
    report.same_texts = report.texts - len(wrong)
    if wrong:
        report.problems.append(
            f"{len(wrong)} of {report.texts} texts have other tokens than in training ({_named(wrong)})"
        )


def _prompts(reader: Reader, expected: Expected, report: Report) -> None:
    report.prompts = len(expected.talks)
    wrong = []
    for name, ids in expected.talks.items():
        try:
            same = reader.prompt(TALKS[name], thinking=expected.thinking) == ids
        except CheckError:
            same = False
        if not same:
            wrong.append(name)
    report.same_prompts = report.prompts - len(wrong)
    if wrong:
        report.problems.append(
            f"{len(wrong)} of {report.prompts} conversations are rendered to other tokens than in training ({_named(wrong)})"
        )


def _ends(reader: Reader, expected: Expected, report: Report) -> None:
    missing = sorted(set(expected.stop_ids) - reader.ends())
    if missing:
        report.problems.append(
            f"answers would not end at the tokens {', '.join(map(str, missing))}, as they did in training"
        )


def _weights(reader: Reader, expected: Expected, report: Report) -> None:
    """Whether the weights are those that were written, seen from what they give. Answers alone may stay the same with others."""
    found = {name: reader.nll([*one.prompt, *one.tokens]).tolist() for name, one in expected.answers.items()}
    wanted = expected.nll if expected.made_nll is None else expected.made_nll
    pairs = [(a, b) for name, values in found.items() for a, b in zip(wanted[name], values, strict=True)]
    report.nll = found
    report.nll_difference = float(np.mean([abs(a - b) for a, b in pairs]))
    limit = STILL if expected.made_nll is not None else ROUNDED if report.exact else np.inf
    if not report.nll_difference <= limit:
        since = "when they were made" if expected.made_nll is not None else "of the run's model"
        report.problems.append(
            f"the likelihoods of the probes are not those {since}: they differ by {report.nll_difference:.3g} nats a token: "
            "these are other weights"
        )


def _answers(reader: Reader, answers: Mapping[str, Answer], stops: Sequence[int], report: Report) -> None:
    wrong = []
    spent_s, made = 0.0, 0
    for name, wanted in answers.items():
        began = time.monotonic()
        found = reader.answer(wanted.prompt, set(stops))
        spent_s += time.monotonic() - began
        made += len(found.tokens)
        same = _same(wanted.tokens, found.tokens)
        report.tokens += len(wanted.tokens)
        report.same_tokens += same
        if same == len(wanted.tokens) == len(found.tokens):
            report.same_answers += 1
        elif same < len(wanted.gaps) and wanted.gaps[same] <= TIE:
            report.ties += 1
        else:
            wrong.append(f"{name} at token {same}")
    report.answers = len(answers)
    report.tokens_per_s = made / spent_s if spent_s else None
    if wrong and report.exact:
        report.problems.append(f"{len(wrong)} of {report.answers} answers are not the run's ({_named(wrong)})")


def _same(wanted: Sequence[int], found: Sequence[int]) -> int:
    """Tokens before the first that differs."""
    pairs = zip(wanted, found, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(wanted), len(found)))


def _likelihood(reader: Reader, held: HeldOut, limit: float, report: Report) -> None:
    """Judged beyond what chance explains: of few tokens, rounding alone moves the mean by some percent either way."""
    if not held.nll.size:
        report.not_run.append("perplexity: no rows of the run are at hand")
        return
    change_T = counting(held.rows, reader.nll) - held.nll
    mean, error = float(change_T.mean()), float(change_T.std() / max(change_T.size - 1, 1) ** 0.5)
    report.perplexity_run = float(np.exp(held.nll.mean()))
    report.perplexity = float(np.exp(held.nll.mean() + mean))
    report.perplexity_change, report.perplexity_error = float(np.expm1(mean)), error
    report.limit = limit
    off = abs(mean) if report.exact else mean
    if not off - CERTAIN * error <= np.log1p(limit):
        report.problems.append(
            f"the perplexity of held-out rows is {report.perplexity:.4g}, the run's {report.perplexity_run:.4g}: "
            f"{report.perplexity_change:+.1%} (standard error {error:.1%}), and {limit:.1%} is allowed"
        )


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
