"""Raw rows -> parsed rows -> tokens, a batch at a time, every row accounted for.

Preparing on disk and streaming both go through here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice

from tunedock.data import formats, sources
from tunedock.data.account import Account
from tunedock.data.chat import Chat, Encoded
from tunedock.data.columns import check_columns
from tunedock.data.conversation import Conversation, Document, Example, RowRefused, to_json
from tunedock.data.sources import RawRow
from tunedock.errors import DataError
from tunedock.recipe.schema import Recipe, Source

DETECT_ROWS = 100
"""Rows of a source its format is told from."""

ENCODE_ROWS = 256
"""Rows that go through the tokenizer together."""


@dataclass(frozen=True, slots=True)
class Parsed:
    """A row that made sense, on its way to tokens."""

    row_id: str
    index: int
    key: str
    example: Example


def parsed_rows(
    recipe: Recipe, source: Source, account: Account, *, skip_rows: int = 0, first_index: int = 0
) -> Iterator[Parsed]:
    """Rows of a source that make sense, for `encode_rows` to count; the others are counted and dropped here."""
    rows = sources.read_rows(source, hub=recipe.hub, offline=recipe.offline)
    head = list(islice(rows, DETECT_ROWS))
    _refuse_unreadable(source, head)
    readable = [row.value for row in head if row.problem is None and isinstance(row.value, dict)]
    check_columns(source, readable)
    format_: str = source.format
    if format_ == "auto":
        format_ = formats.detect(readable, source)
    account.formats[source.path] = format_
    for number, row in enumerate(chain(head, rows)):
        if number < skip_rows:
            continue
        try:
            if row.problem is not None:
                raise RowRefused(*row.problem)
            example = formats.parse(row.value, format_, source.columns, system=recipe.data.system)
            _fits(recipe.objective, example, format_)
            by = recipe.data.split.group_by
            key = formats.group_of(row.value, by) if by else content_key(example)
        except RowRefused as refused:
            account.read += 1
            account.drop(row.row_id, refused.reason, refused.detail)
            continue
        yield Parsed(row.row_id, first_index + number, key, example)


def _refuse_unreadable(source: Source, head: Sequence[RawRow]) -> None:
    """Rows that are all broken are no data set with bad rows but another kind of file, and are not counted one by one."""
    problem = head[0].problem if head and all(row.problem is not None for row in head) else None
    if problem is None:
        return
    raise DataError(
        f"none of the first {len(head)} row(s) can be read; {head[0].row_id}: {problem[1]}",
        where=source.path,
        hint="the extension tells how a file is read: check that it is what its name says, compressed files with their "
        "suffix (.jsonl.gz), text in UTF-8",
    )


def content_key(example: Example) -> str:
    text = json.dumps(to_json(example), ensure_ascii=False, sort_keys=True)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def encode_rows(rows: Iterator[Parsed], chat: Chat, account: Account) -> Iterator[tuple[Parsed, list[Encoded]]]:
    """Tokens for rows, a batch at a time through the tokenizer; refused rows go to the account."""
    while batch := list(islice(rows, ENCODE_ROWS)):
        made = chat.encode([(row.row_id, row.example) for row in batch])
        for row, outcome in zip(batch, made, strict=True):
            account.read += 1
            if isinstance(outcome, RowRefused):
                account.drop(row.row_id, outcome.reason, outcome.detail)
                continue
            account.kept += 1
            account.samples += len(outcome)
            for encoded in outcome:
                if encoded.cut_tokens:
                    account.cut(encoded.sample.row_id, encoded.cut_tokens)
                account.no_stop += not encoded.has_stop
            yield row, outcome


def _fits(objective: str, example: Example, format_: str) -> None:
    """Raises DataError when the rows' shape is not what the objective trains on."""
    wanted = Document if objective == "pretrain" else Conversation
    if not isinstance(example, wanted):
        needs = "documents (`text`)" if objective == "pretrain" else "conversations or prompts with answers"
        other = {Document: "pretrain", Conversation: "sft"}.get(type(example))
        raise DataError(
            f"`objective: {objective}` needs {needs}, and these rows are of the format `{format_}`",
            where="data.train",
            hint="check the file and its `format:` and `columns:`"
            + (f", or set `objective: {other}`" if other else ""),
        )
