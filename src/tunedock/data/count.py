"""How many rows a recipe trains on, and about how long they are, without a tokenizer: for plans, on a machine without torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from tunedock.data.account import Account
from tunedock.data.conversation import Example, Verdicts, to_json, verdicts
from tunedock.data.rows import parsed_rows
from tunedock.data.split import SIDES, assign
from tunedock.events import Emitter
from tunedock.recipe.schema import Recipe, Source

ASCII_A_TOKEN, OTHERS_A_TOKEN = 4.0, 1.4
"""Characters that make a token, by the tokenizers of today: of English and code, and of Chinese, Japanese and Korean."""

TURN_TOKENS = 5
"""What a chat template puts around a turn."""

TOLD_EVERY = 10_000

_OTHER = re.compile(r"[^\x00-\x7f]")


def count(recipe: Recipe, emit: Emitter) -> dict[str, Any]:
    """`plan.outlook.Rows` as an object: rows read, samples of each side as far as the rows' form tells, tokens."""
    account = Account()
    rows = 0
    own: list[int] = []
    for sources in _held_out(recipe):
        own.append(0)
        for _, example in _rows(recipe, sources, account):
            rows += 1
            own[-1] += len(_samples(example))
    own_validation, own_test = own
    keys: list[str] = []
    lengths: list[tuple[float, float]] = []
    for key, example in _rows(recipe, recipe.data.train, account):
        rows += 1
        for one in _samples(example):
            keys.append(key)
            lengths.append(about_tokens(one))
        if rows % TOLD_EVERY == 0:
            emit.progress("counting", rows, unit="rows")
    sides = assign(keys, recipe.data.split) if keys else dict.fromkeys(SIDES, ())
    train = [lengths[i] for i in sides["train"]]
    longest = recipe.data.max_length
    return {
        "read": account.read + rows,
        "train": len(train),
        "validation": own_validation or len(sides["validation"]),
        "test": own_test or len(sides["test"]),
        "mean_tokens": sum(min(all_, longest) for all_, _ in train) / len(train) if train else None,
        "mean_trained": sum(min(trained, longest) for _, trained in train) / len(train) if train else None,
    }


def _samples(example: Example) -> Sequence[Example]:
    """What a row is trained on as: a pair that is read as verdicts makes two samples."""
    return verdicts(example) if isinstance(example, Verdicts) else (example,)


def about_tokens(example: Example) -> tuple[float, float]:
    """(all tokens, those that carry loss) of an example, by its characters; right within a third for most tokenizers."""
    every = trained = 0.0
    value = to_json(example)
    for name, item in value.items():
        turns = item if isinstance(item, list) else [{"role": "assistant", "content": item}] if name == "text" else []
        for turn in turns:
            tokens = _tokens(str(turn.get("content") or "")) + _tokens(str(turn.get("reasoning") or "")) + TURN_TOKENS
            every += tokens
            trained += tokens if turn.get("role") == "assistant" else 0.0
    return every, trained


def _tokens(text: str) -> float:
    others = len(_OTHER.findall(text))
    return (len(text) - others) / ASCII_A_TOKEN + others / OTHERS_A_TOKEN


def _held_out(recipe: Recipe) -> tuple[list[Source], list[Source]]:
    return recipe.data.validation, recipe.data.test


def _rows(recipe: Recipe, sources: list[Source], account: Account) -> Any:
    for source in sources:
        for row in parsed_rows(recipe, source, account):
            yield row.key, row.example
