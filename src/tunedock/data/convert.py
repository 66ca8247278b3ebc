"""Rows of any source -> a file of another format, through the examples training would use.

Each row read is written or refused with its reason: read = written + refused. The file is written beside its place, read back and
compared, example by example, with what was meant, and only then moved there; memory holds a batch of rows and a few refusals.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tunedock.data import formats
from tunedock.data.account import EXAMPLES_KEPT
from tunedock.data.conversation import (
    Conversation,
    Document,
    Example,
    Labelled,
    Message,
    Preference,
    RowRefused,
    to_json,
    verdicts,
)
from tunedock.data.files import FileType, file_type
from tunedock.data.formats_out import FORMATS, held, marked, say, schema
from tunedock.data.records import read_records
from tunedock.data.records_out import FLAT, KINDS, Write, beside, publish, rows_into
from tunedock.data.rows import open_source
from tunedock.errors import BugError, DataError, DiskError, RecipeError
from tunedock.events import Emitter
from tunedock.recipe.conversion import Order
from tunedock.recipe.schema import Source

TOLD_EVERY = 10_000


@dataclass(slots=True)
class Conversion:
    """What happened to the rows."""

    to: str
    out: str | None = None
    """None where nothing was written."""
    read: int = 0
    written: int = 0
    rows: int = 0
    """In the file; a pair that becomes verdicts makes two."""
    reasons: Counter[str] = field(default_factory=Counter)
    refusals: list[list[str]] = field(default_factory=list)
    """[row id, reason, detail] of the first of each reason."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Rows that lost something by `without`."""
    formats: dict[str, str] = field(default_factory=dict)
    """Source path -> its format."""

    @property
    def refused(self) -> int:
        return self.reasons.total()

    def refuse(self, row_id: str, why: RowRefused) -> None:
        self.reasons[why.reason] += 1
        if self.reasons[why.reason] <= EXAMPLES_KEPT:
            self.refusals.append([row_id, why.reason, why.detail])

    def to_json(self) -> dict[str, Any]:
        return {
            "to": self.to,
            "out": self.out,
            "read": self.read,
            "written": self.written,
            "refused": self.refused,
            "rows": self.rows,
            "reasons": dict(self.reasons.most_common()),
            "refusals": self.refusals,
            "left_out": dict(self.left_out),
            "formats": self.formats,
        }

    def judge(self, max_dropped: float) -> None:
        """Raises DataError when no row, or too few of them, could be written."""
        if not self.read:
            raise DataError("there is no row in the data", where=next(iter(self.formats), None), hint="check the files")
        if self.refused and (not self.written or self.refused > max_dropped * self.read):
            share = f"{self.refused} of {self.read} rows" if self.written else f"all {self.read} rows"
            first = next(iter(self.reasons.most_common()))[0]
            row_id, _, detail = next(refusal for refusal in self.refusals if refusal[1] == first)
            counts = ", ".join(f"{reason} {count}" for reason, count in self.reasons.most_common())
            raise DataError(
                f"{share} cannot be written as `{self.to}`, so nothing was: {counts} (first: {detail})",
                where=row_id,
                hint=_HINTS.get(first, "mend these rows")
                + ("; `--max-dropped 1` writes the others" if self.written else ""),
            )


_HINTS = {
    "call_id": "`--without ids` leaves the ids out",
    "turn_name": "`--without names` leaves the names out",
    "untrained_answer": "`--without marks` trains every answer, `--to messages` keeps the marks",
    "trained_history": "`--train-on last` takes earlier answers as context, `--to messages` says them all",
    "tool_turns": "`--to messages` and `--to sharegpt` have calls",
    "several_turns": "`--to messages` has turns; in Parquet and JSON, pairs and verdicts have them too",
    "call_beside_text": "`--to messages` has both",
    "missing_column": "name the file's own columns: `--columns prompt=question --columns completion=reply`",
}


def convert(order: Order, emit: Emitter) -> Conversion:
    """Converts, and emits what happened as the result before it is judged.

    Raises RecipeError for a place that cannot be written to, DataError for sources that cannot be read or hold something else than
    the format does, for too many refused rows, and DiskError.
    """
    out = Path(order.out)
    kind = _writable(out, order)
    done = Conversion(order.to)
    with _disk(out), ExitStack() as stack:
        aside = stack.enter_context(beside(out))
        meant = hashlib.blake2b(digest_size=16)
        with ExitStack() as files:
            flat = kind.kind in FLAT
            write = files.enter_context(rows_into(aside, kind.kind, kind.compression, schema(order.to, flat=flat)))
            tell = _refusals(order, files)
            for row_id, outcome in _examples(order, done, emit):
                if isinstance(outcome, RowRefused):
                    done.refuse(row_id, outcome)
                    tell({"row_id": row_id, "reason": outcome.reason, "detail": outcome.detail})
                else:
                    _write(row_id, outcome, order, flat, write, tell, done, meant)
        emit.progress("converting", done.read, done.read, "rows")
        try:
            done.judge(order.max_dropped)
        except DataError:
            emit.result(done.to_json())
            raise
        _compare(aside, kind, order, done, meant.hexdigest(), emit)
        _publish(aside, out, "--out", order.force)
    done.out = str(out)
    emit.result(done.to_json())
    return done


def _write(
    row_id: str,
    examples: Sequence[Example],
    order: Order,
    flat: bool,
    write: Write,
    tell: Write,
    done: Conversion,
    meant: Any,
) -> None:
    """Writes the rows of one row read: all of them or, where one cannot be said, none."""
    try:
        rows = [say(example, order.to, flat=flat) for example in examples]
    except RowRefused as refused:
        done.refuse(row_id, refused)
        tell({"row_id": row_id, "reason": refused.reason, "detail": refused.detail})
        return
    for example, row in zip(examples, rows, strict=True):
        write(row)
        meant.update(_bytes(example))
    done.written += 1
    done.rows += len(rows)


def _writable(out: Path, order: Order) -> FileType:
    """What the output's name says it is. Raises RecipeError where it cannot be."""
    kind = file_type(out.name)
    if kind is None or kind.kind not in KINDS:
        why = (
            "a text file is one document" if kind else "the extension tells the kind of file, and this is none of them"
        )
        names = ", ".join(f".{name}" for name in KINDS)
        raise RecipeError(
            why, where=f"--out {out}", hint=f"end it in {names}; each also with .gz, .zst, .lz4, .bz2 or .xz"
        )
    for option, path in (("--out", out), ("--refused", Path(order.refused) if order.refused else None)):
        if path is None:
            continue
        if path.is_dir():
            raise RecipeError("this is a folder", where=f"{option} {path}", hint="name a file in it")
        if not path.parent.is_dir():
            raise RecipeError(f"there is no folder {path.parent}", where=f"{option} {path}", hint="make it first")
        if path.exists() and not order.force:
            raise _in_the_way(option, path)
    if order.refused and Path(order.refused) == out:
        raise RecipeError("`--out` and `--refused` are one file", where=f"--out {out}", hint="give two names")
    return kind


def _in_the_way(option: str, path: Path) -> RecipeError:
    return RecipeError("there is a file already", where=f"{option} {path}", hint="give a new name, or `--force`")


def _publish(aside: Path, path: Path, option: str, force: bool) -> None:
    try:
        publish(aside, path, force=force)
    except FileExistsError:
        raise _in_the_way(option, path) from None


def _examples(order: Order, done: Conversion, emit: Emitter) -> Iterator[tuple[str, Sequence[Example] | RowRefused]]:
    """(row id, what is to be written of it, or why it is no example) of every row. `done` learns what was read and left out."""
    for source in order.sources:
        format_, rows = open_source(source, hub=order.hub, offline=order.offline)
        done.formats[source.path] = format_
        _refuse_other_kind(source, format_, order.to)
        for row in rows:
            done.read += 1
            if done.read % TOLD_EVERY == 0:
                emit.progress("converting", done.read, unit="rows")
            try:
                if row.problem is not None:
                    raise RowRefused(*row.problem)
                example = formats.parse(row.value, format_, source.columns, system=order.system)
            except RowRefused as refused:
                yield row.row_id, refused
                continue
            yield row.row_id, _meant(example, order, done)


def _refuse_other_kind(source: Source, format_: str, to: str) -> None:
    """Raises DataError when the format wanted holds something else than the rows: no row could be written."""
    wanted, has = held(to), held(format_)
    if has in (wanted, *_MADE_OF.get(wanted, ())):
        return
    others = [name for name in FORMATS if has in (held(name), *_MADE_OF.get(held(name), ()))]
    raise DataError(
        f"the rows are {_WORDS[has]} (format `{format_}`), and `{to}` holds {_WORDS[wanted]}",
        where=source.path,
        hint=f"they can be written as {', '.join(others)}; if that is not what they are, set `--format` or `--columns`",
    )


_MADE_OF: dict[type[Example], tuple[type[Example], ...]] = {Labelled: (Preference,)}
"""What can become another kind of example: a pair is two verdicts."""

_WORDS: dict[type[Example], str] = {
    Conversation: "conversations",
    Document: "documents",
    Preference: "pairs of a chosen and a rejected answer",
    Labelled: "answers with a verdict",
}


def _meant(example: Example, order: Order, done: Conversion) -> Sequence[Example]:
    """The examples one row becomes."""
    if order.train_on == "last" and isinstance(example, Conversation):
        *before, last = example.messages
        marks = [replace(m, weight=0.0) if m.role == "assistant" and m.weight is None else m for m in before]
        example = replace(example, messages=(*marks, last))
    for part in order.without:
        changed = _without(example, part)
        done.left_out[part] += changed != example
        example = changed
    if order.to == "labelled" and isinstance(example, Preference):
        return verdicts(example)
    return (example,)


def _without(example: Example, part: str) -> Example:
    def plain(messages: Sequence[Message]) -> tuple[Message, ...]:
        return tuple(_turn_without(message, part) for message in messages)

    match example:
        case Conversation():
            return replace(example, messages=plain(example.messages))
        case Preference():
            return replace(
                example, prompt=plain(example.prompt), chosen=plain(example.chosen), rejected=plain(example.rejected)
            )
        case Labelled():
            return replace(example, prompt=plain(example.prompt), completion=plain(example.completion))
        case Document():
            return example


def _turn_without(message: Message, part: str) -> Message:
    match part:
        case "ids":
            calls = tuple(replace(call, id=None) for call in message.tool_calls)
            return replace(message, tool_calls=calls, tool_call_id=None)
        case "names":
            return replace(message, name=None)
        case "marks":
            return replace(message, weight=None)
        case _:
            return replace(message, reasoning=None)


def _bytes(example: Example) -> bytes:
    return json.dumps(to_json(marked(example)), ensure_ascii=False).encode() + b"\n"


def _compare(aside: Path, kind: FileType, order: Order, done: Conversion, meant: str, emit: Emitter) -> None:
    """Reads the file back. Raises DataError when it does not hold what was meant: then it is no file to keep."""
    found = hashlib.blake2b(digest_size=16)
    rows = 0
    try:
        for record in read_records(str(aside), kind.kind):
            if record.problem is not None:
                raise RowRefused(*record.problem)
            found.update(_bytes(formats.parse(record.value, order.to, {})))
            rows += 1
            if rows % TOLD_EVERY == 0:
                emit.progress("reading back", rows, done.rows, "rows")
    except RowRefused as refused:
        raise BugError(f"row {rows + 1} of the file written cannot be read back: {refused.detail}") from None
    if rows != done.rows or found.hexdigest() != meant:
        raise BugError(f"the file written does not hold what was meant ({rows} of {done.rows} rows)", where=order.out)


def _refusals(order: Order, files: ExitStack) -> Write:
    """What names a refused row in the file that lists them, which is kept however the conversion ends."""
    if order.refused is None:
        return lambda row: None
    path = Path(order.refused)
    aside = files.enter_context(beside(path))
    files.callback(lambda: _publish(aside, path, "--refused", order.force))
    return files.enter_context(rows_into(aside, "jsonl", None, schema("text")))


@contextmanager
def _disk(out: Path) -> Iterator[None]:
    """A disk that is full or not writable, told with the file that was to be made."""
    try:
        yield
    except OSError as error:
        raise DiskError(
            f"the file cannot be written: {error.strerror or error}",
            where=error.filename or str(out),
            hint="free disk space, or pick another place",
        ) from error
