"""Reward functions that come with tunedock, by the convention of any other (`functions`). `args` of the recipe are keywords here.

`recipe.objectives.rewards.BUILT_IN` lists them for who checks a recipe; a test holds both together.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from tunedock.errors import RewardError

Chat = Sequence[dict[str, Any]]

GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra")
"""What every function may take beside the rows' columns."""


def said(completion: Chat) -> str:
    return str(completion[-1]["content"])


def exact_match(
    completions: Sequence[Chat],
    answer: Sequence[str | None],
    column: str | None = None,
    ignore_case: bool = False,
    **columns: Sequence[Any],
) -> list[float | None]:
    """1 where the answer is the row's own (or what its `column` says), white space around both aside; 0 where it is not. None where
    the row has none."""
    if column is not None and column not in columns:
        others = ", ".join(f"`{name}`" for name in columns if name not in GIVEN)
        raise RewardError(
            f"`exact_match` wants the column `{column}`, which no row has",
            where="objective.rewards",
            hint=f"the rows have {others}"
            if others
            else "the rows have no others; leave `column` out for their own answer",
        )

    def plain(text: Any) -> str:
        return str(text).strip().casefold() if ignore_case else str(text).strip()

    wanted = answer if column is None else columns[column]
    return [
        None if want is None else float(plain(said(made)) == plain(want))
        for made, want in zip(completions, wanted, strict=True)
    ]


def regex_match(completions: Sequence[Chat], pattern: str, **columns: Sequence[Any]) -> list[float | None]:
    """1 where the whole answer, white space around it aside, is of the form `pattern`, whose `.` is also a line's end; else 0."""
    form = re.compile(pattern, re.DOTALL)
    return [float(form.fullmatch(said(made).strip()) is not None) for made in completions]


def length_penalty(
    completion_ids: Sequence[Sequence[int]], free_tokens: int, max_tokens: int, **columns: Sequence[Any]
) -> list[float | None]:
    """0 up to `free_tokens` tokens, from there down to -1 at `max_tokens` and beyond (DAPO, arXiv 2503.14476, eq. 13)."""
    span = max_tokens - free_tokens
    return [-min(max(len(ids) - free_tokens, 0) / span, 1.0) for ids in completion_ids]


FUNCTIONS = {function.__name__: function for function in (exact_match, regex_match, length_penalty)}
