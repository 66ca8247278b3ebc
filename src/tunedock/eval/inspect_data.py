"""The stages without a run, `data-check` and `data-show`: what a recipe's data becomes, told by the code that trains on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tunedock.data import prepare as preparing
from tunedock.data import sources, split
from tunedock.data.account import Account
from tunedock.data.conversation import RowRefused, to_json
from tunedock.data.report import histogram, length_statistics, write_report
from tunedock.data.rows import Parsed, encode_rows, parsed_rows
from tunedock.data.sample import Sample
from tunedock.errors import DataError
from tunedock.events import Emitter
from tunedock.model.session import Base, find_base
from tunedock.recipe.schema import Recipe, Source

STREAM_CHECK_ROWS = 10_000
"""Rows of a stream that `data check` looks at."""


def check(recipe: Recipe, emit: Emitter, *, to: Path | None) -> Account:
    """Emits the account, sizes and lengths as the result, and returns the account for the caller to judge.

    The report goes to `to`, or beside the tokenised data.
    """
    base = find_base(recipe, weights=False)
    if recipe.data.streaming:
        account, lengths, trained, sides = _check_stream(base, recipe)
        folder = to
    else:
        prepared = preparing.prepare(recipe, base.chat, emit)
        account, sides = prepared.account, prepared.summary()
        stores = [prepared.side(side) for side in split.SIDES]
        lengths = np.concatenate([store.lengths for store in stores])
        trained = np.concatenate([store.trained for store in stores])
        folder = to or prepared.folder / "report"
    result: dict[str, Any] = {
        "account": account.to_json(),
        "splits": sides,
        "histogram": histogram(lengths.tolist()),
        "lengths": length_statistics(lengths.tolist()),
        "trained_share": float(trained.sum() / max(lengths.sum(), 1)),
        "empty_answers": account.reasons.get("empty_answer", 0),
        "duplicates": account.duplicates,
        "no_stop": account.no_stop,
        "report": str(folder) if folder else None,
    }
    if folder is not None:
        write_report(folder, result)
    emit.result(result)
    return account


def _check_stream(base: Base, recipe: Recipe) -> tuple[Account, Any, Any, dict[str, Any]]:
    """The first rows of each source; a stream is too long to be read for a look."""
    account = Account()
    sides: dict[str, dict[str, int]] = {side: {"samples": 0, "tokens": 0, "trained_tokens": 0} for side in split.SIDES}
    lengths: list[int] = []
    trained: list[int] = []
    for source in recipe.data.train:
        part = source.model_copy(
            update={"num_samples": min(source.num_samples or STREAM_CHECK_ROWS, STREAM_CHECK_ROWS)}
        )
        for row, encoded in encode_rows(parsed_rows(recipe, part, account), base.chat, account):
            side = sides[split.side_of(row.key, recipe.data.split)]
            for one in encoded:
                weighted = _trained(one.sample)
                lengths.append(one.sample.tokens)
                trained.append(weighted)
                side["samples"] += 1
                side["tokens"] += one.sample.tokens
                side["trained_tokens"] += weighted
    return account, np.asarray(lengths, np.int64), np.asarray(trained, np.int64), sides


def _trained(sample: Sample) -> int:
    return sum(int(np.count_nonzero(segment.weights_T)) for segment in sample.segments)


def show(recipe: Recipe, *, row: str) -> dict[str, Any]:
    """One row: what it means and each token with its weight; or why it was refused.

    `row` is a number in reading order, from 0, or a row id (`file:line`). Raises DataError when there is no such row.
    """
    base = find_base(recipe, weights=False)
    source, number, index = _place_of(recipe, row)
    account = Account()
    rows = parsed_rows(recipe, source, account, skip_rows=number, first_index=index - number)
    parsed: Parsed | None = None
    for candidate in rows:
        parsed = candidate if candidate.index == index else None
        break
    shown: dict[str, Any] = {"index": index, "max_length": recipe.data.max_length, "leaves": [], "cut_tokens": 0}
    if parsed is None:
        drop = account.drops[0]
        refused = {"reason": drop.reason, "detail": drop.detail}
        return {**shown, "row_id": drop.row_id, "split": None, "example": None, "refused": refused, "has_stop": False}
    (outcome,) = base.chat.encode([(parsed.row_id, parsed.example)])
    shown |= {"row_id": parsed.row_id, "example": to_json(parsed.example), "split": _side(base, recipe, parsed)}
    if isinstance(outcome, RowRefused):
        return {**shown, "refused": {"reason": outcome.reason, "detail": outcome.detail}, "has_stop": False}
    leaves = [_leaf(base, one.sample, leaf) for one in outcome for leaf in one.sample.leaves()]
    return {
        **shown,
        "refused": None,
        "leaves": leaves,
        "cut_tokens": sum(one.cut_tokens for one in outcome),
        "has_stop": all(one.has_stop for one in outcome),
    }


def _place_of(recipe: Recipe, row: str) -> tuple[Source, int, int]:
    """(source, row of the source, row of all sources) of a number or a row id."""
    wanted = int(row) if row.isdecimal() else None
    index = 0
    for source in (*recipe.data.train, *recipe.data.validation, *recipe.data.test):
        for number, raw in enumerate(sources.read_rows(source, hub=recipe.hub, offline=recipe.offline)):
            if index == wanted or raw.row_id == row:
                return source, number, index
            index += 1
    raise DataError(
        f"there is no row `{row}`; the data has {index} rows",
        where="--row",
        hint=f"a number from 0 to {index - 1}, or a row id such as `file.jsonl:12`",
    )


def _side(base: Base, recipe: Recipe, row: Parsed) -> str | None:
    """Which side of the split the row is on; None when the data has not been prepared yet, which `data check` does."""
    if recipe.data.streaming:
        return split.side_of(row.key, recipe.data.split)
    prepared = preparing.find(recipe, base.chat)
    if prepared is None:
        return None
    for name in split.SIDES:
        store = prepared.side(name)
        if row.index in store.row_indices():
            return name
    return None


def _leaf(base: Base, sample: Sample, leaf: int) -> dict[str, Any]:
    tokens_T, weights_T = sample.path(leaf)
    ids = tokens_T.tolist()
    texts = _texts(base, ids)
    return {
        "tokens": [
            {"id": token, "text": text, "weight": weight}
            for token, text, weight in zip(ids, texts, weights_T.tolist(), strict=True)
        ],
        "text": base.tokenizer.decode(ids),
    }


def _texts(base: Base, ids: list[int]) -> list[str]:
    """The text each token adds; a token that ends inside a character adds nothing until the character is whole."""
    texts: list[str] = []
    start = 0
    for end in range(1, len(ids) + 1):
        piece = base.tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False)
        if piece.endswith("\ufffd") and end - start < 8 and end < len(ids):
            texts.append("")
            continue
        texts.append(piece)
        start = end
    return texts
