"""Rows of any source -> a file of another format, through the examples training would use.

Each row read is written or refused with its reason: read = written + refused. The file is written beside its place, read back and
compared, example by example, with what was meant, and only then moved there; memory holds a batch of rows and a few refusals.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from tunedock.data import formats
from tunedock.data.columns import OPTIONAL, REQUIRED
from tunedock.data.conversation import (
    Conversation,
    Document,
    Example,
    Labelled,
    Message,
    Preference,
    Prompt,
    RowRefused,
    to_json,
    verdicts,
)
from tunedock.data.convert_account import Conversion
from tunedock.data.files import FileType, file_type, is_url
from tunedock.data.formats_out import FORMATS, held, marked, say, schema, spellings
from tunedock.data.records import read_records
from tunedock.data.records_out import FLAT, KINDS, Write, beside, publish, rows_into
from tunedock.data.rows import open_source
from tunedock.errors import BugError, DataError, DiskError, RecipeError
from tunedock.events import Emitter
from tunedock.recipe.conversion import Order
from tunedock.recipe.schema import Source

TOLD_EVERY = 10_000
_REFUSAL = pa.schema([("row_id", pa.string()), ("reason", pa.string()), ("detail", pa.string())])

_json = json.JSONEncoder(ensure_ascii=False).encode


def convert(order: Order, emit: Emitter) -> Conversion:
    """Converts, and emits what happened as the result before it is judged.

    Raises RecipeError for a place that cannot be written to, DataError for sources that cannot be read or hold something else than
    the format does, for too many refused rows, and DiskError.
    """
    out = Path(order.out)
    done = Conversion(order.to)
    with _disk(out), ExitStack() as stack:
        kind = _writable(out, order)
        spelling = _spelling(order, kind)
        aside = stack.enter_context(beside(out))
        named = Path(order.refused) if order.refused else None
        named_aside = stack.enter_context(beside(named)) if named else None
        meant = hashlib.blake2b(digest_size=16)
        with ExitStack() as files:
            columns = schema(order.to, spelling)
            write = files.enter_context(rows_into(aside, kind.kind, kind.compression, columns))
            tell = files.enter_context(rows_into(named_aside, "jsonl", None, _REFUSAL)) if named_aside else _nowhere
            for row_id, outcome in _examples(order, done, emit):
                if isinstance(outcome, RowRefused):
                    done.refuse(row_id, outcome)
                    tell({"row_id": row_id, "reason": outcome.reason, "detail": outcome.detail})
                else:
                    _write(row_id, outcome, order, spelling, write, tell, done, meant)
        emit.progress("converting", done.read, done.read, "rows")
        if named and named_aside:
            _publish(named_aside, named, "--refused", order.force)
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


def _nowhere(row: Mapping[str, Any]) -> None:
    """Takes the refused rows when nobody wants a list of them."""


def _write(
    row_id: str,
    examples: Sequence[Example],
    order: Order,
    spelling: str,
    write: Write,
    tell: Write,
    done: Conversion,
    meant: Any,
) -> None:
    """Writes the rows of one row read: all of them or, where one cannot be said, none."""
    try:
        rows = [say(example, order.to, spelling) for example in examples]
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
    if order.refused:
        refused = Path(order.refused).resolve()
        if refused == out.resolve():
            raise RecipeError("`--out` and `--refused` are one file", where=f"--out {out}", hint="give two names")
        if refused.is_file() and any(_holds(source.path, refused) for source in order.sources):
            raise RecipeError(
                "this is a file that is read, and a list of refused rows would take the place of its rows",
                where=f"--refused {order.refused}",
                hint="give a new name",
            )
    return kind


def _holds(source: str, file: Path) -> bool:
    """Whether a source is a file, or the folder it lies in. `--out` may be one, for it has the rows; not what tells of them."""
    if is_url(source):
        return False
    path = Path(source).resolve()
    return file == path or (path.is_dir() and file.is_relative_to(path))


def _spelling(order: Order, kind: FileType) -> str:
    """How the rows are written. Raises RecipeError where the format or the kind of file has no such spelling."""
    flat = kind.kind in FLAT
    if order.spelling == "trl":
        return "flat" if flat else "trl"
    known = [name for name in spellings(order.to) if name != "flat"]
    where = f"--spelling {order.spelling}"
    if order.spelling not in known:
        hint = f"`{order.to}` has {', '.join(known)}" if known else "only `preference` and `labelled` have several"
        raise RecipeError(f"`{order.to}` has no such spelling", where=where, hint=hint)
    if flat or (schema(order.to, order.spelling) is None and kind.kind not in ("json", "jsonl")):
        raise RecipeError("this kind of file has no room for such rows", where=where, hint="end `--out` in .jsonl")
    return order.spelling


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
        read = {*REQUIRED, *OPTIONAL, *source.columns.values()}
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
            done.leave(name for name, value in row.value.items() if name not in read and value is not None)
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
        hint=(f"they can be written as {', '.join(others)}; " if others else "there is nothing to convert; ")
        + "if that is not what they are, set `--format` or `--columns`",
    )


_MADE_OF: dict[type[Example], tuple[type[Example], ...]] = {Labelled: (Preference,)}
"""What can become another kind of example: a pair is two verdicts."""

_WORDS: dict[type[Example], str] = {
    Conversation: "conversations",
    Document: "documents",
    Preference: "pairs of a chosen and a rejected answer",
    Labelled: "answers with a verdict",
    Prompt: "prompts without answers",
}


def _meant(example: Example, order: Order, done: Conversion) -> Sequence[Example]:
    """The examples one row becomes."""
    if order.train_on == "last" and isinstance(example, Conversation):
        *before, last = example.messages
        marks = [replace(m, weight=0.0) if m.role == "assistant" and m.weight is None else m for m in before]
        example = replace(example, messages=(*marks, last))
    for part in order.without:
        changed = _without(example, part)
        done.left_out[part] += marked(changed) != marked(example)
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
        case Document() | Prompt():
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
    """An example for comparison; the order of a call's arguments counts, for templates print it."""
    return _json(to_json(marked(example))).encode() + b"\n"


def _compare(aside: Path, kind: FileType, order: Order, done: Conversion, meant: str, emit: Emitter) -> None:
    """Reads the file back. Raises BugError when it does not hold what was meant, DataError when it is too large to be read."""
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
        said = f"row {rows + 1} of the file written cannot be read back: {refused.detail}"
        raise BugError(said, where=order.out) from None
    except DataError as error:
        raise DataError(error.message, where=order.out, hint=error.hint) from None
    if rows != done.rows or found.hexdigest() != meant:
        raise BugError(f"the file written does not hold what was meant ({rows} of {done.rows} rows)", where=order.out)


@contextmanager
def _disk(out: Path) -> Iterator[None]:
    """A disk that is full or not writable, told with the file that was to be made."""
    try:
        yield
    except OSError as error:
        raise DiskError(
            f"the file cannot be written: {error.strerror or error}",
            where=str(out),
            hint="free disk space, or pick another place",
        ) from error
