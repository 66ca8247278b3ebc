"""A chunk of rows -> their samples as one record batch, and all that is to be said about them.

Preparing goes chunk by chunk, in one process or in many: the chunks are the same, and so is what they become.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pyarrow as pa

from tunedock.data.account import Account
from tunedock.data.chat import Chat
from tunedock.data.conversation import Document, RowRefused, answers
from tunedock.data.rows import Parsed, Reading, drop, keep
from tunedock.data.sources import RawRow
from tunedock.data.store import Stored, batch_of

CHUNK_ROWS = 256
"""Rows of a chunk: enough to fill a call of the tokenizer, few enough to keep every process busy to the end."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows of one source that follow each other."""

    reading: Reading
    rows: tuple[RawRow, ...]
    first_index: int
    """Number of the first row in reading order, over all sources."""

    @property
    def place(self) -> str:
        return f"{self.rows[0].row_id} to {self.rows[-1].row_id}"


@dataclass(frozen=True, slots=True)
class Made:
    """What a chunk became. `keys`, `lengths` and `trained` are by sample, `contents` by kept row."""

    batch: pa.RecordBatch
    account: Account
    keys: list[str]
    contents: list[str]
    lengths: list[int]
    trained: list[int]
    answers: int
    reasoned: int
    stops_before: frozenset[int]
    stops_after: frozenset[int]
    """Rows can teach stop tokens, and the rows after them are encoded with what they taught."""


def chunks_of(reading: Reading, rows: Iterator[RawRow], *, first_index: int) -> Iterator[Chunk]:
    while part := tuple(islice(rows, CHUNK_ROWS)):
        yield Chunk(reading, part, first_index)
        first_index += len(part)


def make(chunk: Chunk, chat: Chat) -> Made:
    """Parses and encodes the rows; drops are in reading order. Raises DataError for rows the objective cannot train on."""
    before = chat.stop_ids
    parsed = [_parsed(chunk.reading, row, chunk.first_index + n) for n, row in enumerate(chunk.rows)]
    encoded = iter(chat.encode([(row.row_id, row.example) for row in parsed if isinstance(row, Parsed)]))
    account = Account()
    stored: list[Stored] = []
    keys: list[str] = []
    contents: list[str] = []
    trained_turns = reasoned = 0
    for raw, row in zip(chunk.rows, parsed, strict=True):
        outcome = row if isinstance(row, RowRefused) else next(encoded)
        if isinstance(outcome, RowRefused) or isinstance(row, RowRefused):
            drop(raw.row_id, outcome, account)  # type: ignore[arg-type]
            continue
        keep(outcome, account)
        turns = answers(row.example)
        trained_turns += len(turns)
        reasoned += sum(turn.reasoning is not None for turn in turns)
        contents.append(row.content)
        keys += [row.key] * len(outcome)
        shown = Document("") if isinstance(row.example, Document) else row.example
        stored += [Stored(one.sample, row.index, shown, one.cut_tokens, one.has_stop) for one in outcome]
    return Made(
        batch=batch_of(stored),
        account=account,
        keys=keys,
        contents=contents,
        lengths=[one.sample.tokens for one in stored],
        trained=[sum(int(np.count_nonzero(s.weights_T)) for s in one.sample.segments) for one in stored],
        answers=trained_turns,
        reasoned=reasoned,
        stops_before=before,
        stops_after=chat.stop_ids,
    )


def _parsed(reading: Reading, row: RawRow, index: int) -> Parsed | RowRefused:
    try:
        return reading.parse(row, index)
    except RowRefused as refused:
        return refused
