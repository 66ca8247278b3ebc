"""Raw rows -> parsed rows -> tokens, a batch at a time, every row accounted for.

Preparing on disk and streaming both go through here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from types import UnionType

from tunedock.data import formats, sources
from tunedock.data.account import Account
from tunedock.data.chat import Chat, Encoded
from tunedock.data.columns import check_columns
from tunedock.data.conversation import (
    Conversation,
    Document,
    Example,
    Labelled,
    Preference,
    Prompt,
    RowRefused,
    Verdicts,
    to_json,
)
from tunedock.data.sources import FIRST, RawRow, Shard
from tunedock.errors import DataError
from tunedock.recipe.objectives.preference import PAIRS
from tunedock.recipe.objectives.rollout import ROLLOUTS
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
    """What the split goes by: the row's group, or its content."""
    content: str
    """Hex hash of the example: equal for equal rows."""
    example: Example
    shard: Shard = FIRST
    """The file it stands in."""


@dataclass(frozen=True, slots=True)
class Reading:
    """How the rows of one source are understood."""

    format: str
    columns: Mapping[str, str]
    system: str | None
    objective: str
    group_by: str | None

    def parse(self, row: RawRow, index: int) -> Parsed:
        """Raises RowRefused for a row that makes no sense; DataError when rows of this format cannot be trained on."""
        if row.problem is not None:
            raise RowRefused(*row.problem)
        read = formats.asked if _WANTED[self.objective][0] is Prompt else formats.parse
        example = read(row.value, self.format, self.columns, system=self.system)
        if self.objective == "kto" and isinstance(example, Preference):
            example = Verdicts(example.prompt, example.chosen, example.rejected, example.tools)
        _fits(self.objective, example, self.format)
        if self.objective == "reward" and isinstance(example, Preference):
            example = replace(example, margin=formats.margin_of(row.value, self.columns))
        content = content_key(example)
        key = formats.group_of(row.value, self.group_by) if self.group_by else content
        return Parsed(row.row_id, index, key, content, example, row.shard)


def open_rows(recipe: Recipe, source: Source, account: Account) -> tuple[Reading, Iterator[RawRow]]:
    """The rows of a source, and how they are to be understood; the account learns the format. Raises what `open_source` raises."""
    format_, rows = open_source(source, hub=recipe.hub, offline=recipe.offline)
    account.formats[source.path] = format_
    data = recipe.data
    return Reading(format_, source.columns, data.system, recipe.objective.kind, data.split.group_by), rows


def open_source(source: Source, *, hub: str, offline: bool) -> tuple[str, Iterator[RawRow]]:
    """(the format of a source, its rows).

    Raises DataError when the format or the columns are none, or no row at the source's beginning can be read.
    """
    rows = sources.read_rows(source, hub=hub, offline=offline)
    head = list(islice(rows, DETECT_ROWS))
    _refuse_unreadable(source, head)
    readable = [row.value for row in head if row.problem is None and isinstance(row.value, dict)]
    check_columns(source, readable)
    format_: str = source.format
    if format_ == "auto":
        format_ = formats.detect(readable, source)
    return format_, chain(head, rows)


def parsed_rows(
    recipe: Recipe,
    source: Source,
    account: Account,
    *,
    skip_rows: int = 0,
    first_index: int = 0,
    shard: Shard | None = None,
) -> Iterator[Parsed]:
    """Rows of a source that make sense, for `encode_rows` to count; the others are counted and dropped here.

    The first `skip_rows` of the source are left out. With `shard`, a file that begins before the next row, no file before it is
    read.
    """
    reading, rows = open_rows(recipe, source, account)  # the format is told by the beginning, wherever one goes on
    shard = shard or FIRST
    if shard.number:
        rows = sources.read_rows(source, hub=recipe.hub, offline=recipe.offline, shard=shard)
    for number, row in enumerate(rows, start=shard.first_row):
        if number < skip_rows:
            continue
        try:
            yield reading.parse(row, first_index + number)
        except RowRefused as refused:
            drop(row.row_id, refused, account)


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


_SORTED = json.JSONEncoder(ensure_ascii=False, sort_keys=True)


def content_key(example: Example) -> str:
    value = to_json(example)
    value.pop(formats.MARGIN, None)  # of one pair judged twice, both stay on one side of the split
    text = _SORTED.encode(value)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def encode_rows(rows: Iterator[Parsed], chat: Chat, account: Account) -> Iterator[tuple[Parsed, list[Encoded]]]:
    """Tokens for rows, a batch at a time through the tokenizer; refused rows go to the account."""
    while batch := list(islice(rows, ENCODE_ROWS)):
        made = chat.encode([(row.row_id, row.example) for row in batch])
        for row, outcome in zip(batch, made, strict=True):
            if isinstance(outcome, RowRefused):
                drop(row.row_id, outcome, account)
            else:
                keep(outcome, account)
                yield row, outcome


def drop(row_id: str, refused: RowRefused, account: Account) -> None:
    """Counts a row that is not used."""
    account.read += 1
    account.drop(row_id, refused.reason, refused.detail)


def keep(made: Sequence[Encoded], account: Account) -> None:
    """Counts a row and the samples made of it."""
    account.read += 1
    account.kept += 1
    account.samples += len(made)
    if cut := sum(encoded.cut_tokens for encoded in made):
        account.cut(made[0].sample.row_id, cut)
    account.no_stop += not all(encoded.has_stop for encoded in made)


_WANTED: dict[str, tuple[type[Example] | UnionType, str]] = {
    "sft": (Conversation, "conversations or prompts with answers"),
    "pretrain": (Document, "documents (`text`)"),
    **dict.fromkeys(PAIRS, (Preference, "preferences (a prompt with `chosen` and `rejected`)")),
    "reward": (Preference, "preferences (a prompt with `chosen` and `rejected`)"),
    **dict.fromkeys(ROLLOUTS, (Prompt, "prompts, with or without answers")),
    "kto": (Labelled | Verdicts, "completions with a `label`, or preferences"),
}
"""Objective -> the example it trains on, and that in words."""


def _fits(objective: str, example: Example, format_: str) -> None:
    """Raises DataError when the rows' shape is not what the objective trains on."""
    wanted, needs = _WANTED[objective]
    if not isinstance(example, wanted):
        other = next((name for name, (kind, _) in _WANTED.items() if isinstance(example, kind)), None)
        raise DataError(
            f"`objective: {objective}` needs {needs}, and these rows are of the format `{format_}`",
            where="data.train",
            hint="check the file and its `format:` and `columns:`"
            + (f", or set `objective: {other}`" if other else ""),
        )
