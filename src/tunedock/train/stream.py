"""`data.streaming`: rows read while training, for data larger than the disk.

The stream is read in blocks of `data.shuffle_buffer` training samples, each shuffled by seed and block number; at the end of the
last source it begins again. A row's side of the split is fixed by a hash of its group or content, so validation rows are passed
over wherever they turn up. A checkpoint keeps the block's first row and the file it stands in: resuming opens no file before that
one, skips the rows before it unparsed, and encodes one block again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from torch import Tensor

from tunedock.data import sources, split
from tunedock.data.account import Account
from tunedock.data.conversation import Example, answers
from tunedock.data.rows import encode_rows, parsed_rows
from tunedock.data.sample import Sample
from tunedock.data.sources import FIRST, Shard
from tunedock.errors import DataError
from tunedock.events import Emitter
from tunedock.model.session import Base
from tunedock.recipe.schema import Recipe, Source
from tunedock.train.data_record import DataRecord
from tunedock.train.feed import FixedFeed

VALIDATION_SAMPLES = 256
"""A stream's validation set: the first this many samples of that side."""

VALIDATION_SEARCH = 20_000
"""Rows read at most to find them."""


@dataclass(frozen=True, slots=True)
class Place:
    """A position in the stream: round (how often all sources were read), source, row of the source, and the file it stands in."""

    round: int = 0
    source: int = 0
    row: int = 0
    shard: Shard = FIRST

    @property
    def passed_over(self) -> int:
        """Rows of its file that are skipped to get there."""
        return self.row - self.shard.first_row


@dataclass(frozen=True, slots=True)
class _Read:
    sample: Sample
    side: split.Side
    after: Place
    """Where to go on after this sample's row."""


class Stream:
    """Encoded samples of the recipe's sources from a place on, without end, each with its side.

    `account` counts the first round; what was dropped there is dropped in every later one.
    """

    def __init__(self, base: Base, recipe: Recipe, sources: Sequence[Source], account: Account) -> None:
        self._base = base
        self._recipe = recipe
        self._sources = sources
        self.account = account
        self._answers = self._reasoned = 0

    def read(self, place: Place, *, rounds: int | None = None) -> Iterator[_Read]:
        """Raises DataError when a round has no training row, keeps no row at all or drops too many."""
        first = place.round
        while rounds is None or place.round < first + rounds:
            account = self.account if place.round == 0 else Account()
            whole, trains = place.source == place.row == 0, False
            for number in range(place.source, len(self._sources)):
                source = self._sources[number]
                rows = parsed_rows(self._recipe, source, account, skip_rows=place.row, shard=place.shard)
                for row, encoded in encode_rows(rows, self._base.chat, account):
                    after = Place(place.round, number, row.index + 1, row.shard)
                    side = split.side_of(row.key, self._recipe.data.split)
                    trains = trains or side == "train"
                    self._count_reasoning(row.example)
                    yield from (_Read(one.sample, side, after) for one in encoded)
                place = Place(place.round, number + 1, 0)
            if account.read:  # nothing, when a checkpoint was taken at a round's very end
                account.verify(self._recipe.data.max_dropped, self._recipe.data.over_length)
            if whole and not trains and rounds is None:
                raise DataError(
                    f"none of the stream's {account.kept} rows is on the training side of the split",
                    where="data.split",
                    hint="a stream is split by a hash of each row; add rows, or set `data.split.train: 1`",
                )
            place = Place(place.round + 1, 0, 0)

    @property
    def thinking(self) -> bool:
        """Whether most answers read so far bring reasoning."""
        return self._reasoned * 2 > self._answers

    def _count_reasoning(self, example: Example) -> None:
        trained = answers(example)
        self._answers += len(trained)
        self._reasoned += sum(message.reasoning is not None for message in trained)


class StreamFeed(FixedFeed):
    """Steps of a stream, in order. Going back is not possible; `restore` goes to where a checkpoint was."""

    def __init__(self, stream: Stream, *, batch_size: int, buffer: int, seed: int) -> None:
        self._stream = stream
        self._batch_size = batch_size
        self._buffer = buffer
        self._seed = seed
        self._start = Place()
        self._block = 0
        self._offset = 0
        self._samples: list[Sample] = []
        self._next = Place()
        self._reads: Iterator[_Read] | None = None
        self._last: tuple[int, list[Sample]] | None = None
        self._before_last = (self._start, self._block, self._offset)

    def step(self, number: int) -> list[Sample]:
        if self._last is not None and self._last[0] == number:
            return self._last[1]
        self._before_last = (self._start, self._block, self._offset)
        batch: list[Sample] = []
        while len(batch) < self._batch_size:
            if self._offset == len(self._samples):
                self._begin_block(self._next, self._block + 1 if self._samples else self._block)
            take = self._samples[self._offset : self._offset + self._batch_size - len(batch)]
            self._offset += len(take)
            batch += take
        self._last = (number, batch)
        return batch

    def _begin_block(self, start: Place, block: int) -> None:
        if self._reads is None or start != self._next:
            self._reads = (read for read in self._stream.read(start) if read.side == "train")
        self._start, self._block, self._offset = start, block, 0
        reads = self._block_of(self._reads)
        order = np.random.Generator(np.random.Philox(key=[self._seed, block])).permutation(len(reads))
        self._samples = [reads[i].sample for i in order]
        self._next = reads[-1].after

    def _block_of(self, source: Iterator[_Read]) -> list[_Read]:
        """Samples up to the buffer's size or the end of a round; a row's samples are never parted, so a block begins at a row."""
        reads: list[_Read] = []
        for read in source:
            full = len(reads) >= self._buffer and read.after != reads[-1].after
            if reads and (full or read.after.round != reads[-1].after.round):
                self._reads = chain([read], source)
                break
            reads.append(read)
        return reads

    def tell_place(self, emit: Emitter) -> None:
        """After `restore`: where the stream goes on, and what was passed over to get there."""
        place = self._start
        emit.note(
            f"the stream goes on in round {place.round + 1} at row {place.row + 1:,} of source {place.source + 1}, file "
            f"{place.shard.number + 1}: {place.passed_over:,} rows of that file were passed over",
            round=place.round,
            source=place.source,
            row=place.row,
            file=place.shard.number,
            passed_over=place.passed_over,
        )

    @property
    def account(self) -> Account:
        """What has become of the rows read so far, each counted once."""
        return self._stream.account

    def state(self, number: int) -> dict[str, Any]:
        place, block, offset = self._start, self._block, self._offset
        if self._last is not None and self._last[0] == number:  # drawn, but its step was thrown away by a stop
            place, block, offset = self._before_last
        return {
            "kind": "stream",
            "round": place.round,
            "source": place.source,
            "row": place.row,
            "file": place.shard.number,
            "file_row": place.shard.first_row,
            "block": block,
            "offset": offset,
        }

    def restore(self, state: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self._reads, self._last = None, None
        shard = Shard(state.get("file", 0), state.get("file_row", 0))
        self._begin_block(Place(state["round"], state["source"], state["row"], shard), state["block"])
        self._offset = state["offset"]


def streamed_data(
    base: Base, recipe: Recipe, batch_size: int, emit: Emitter
) -> tuple[StreamFeed, list[Sample], DataRecord]:
    """A stream's feed, its validation samples, and what can be recorded of it before all is read."""
    data = recipe.data
    validation = _validation(base, recipe)
    account = Account()
    stream = Stream(base, recipe, data.train, account)
    feed = StreamFeed(stream, batch_size=batch_size, buffer=data.shuffle_buffer, seed=recipe.train.seed)
    first = feed.step(0)
    mean_tokens = float(np.mean([sample.tokens for sample in first]))
    mean_trained = float(np.mean([sum(np.count_nonzero(s.weights_T) for s in sample.segments) for sample in first]))
    emit.note(
        f"data: streaming; {account.read} rows read so far, {account.kept} kept, {account.dropped} dropped; "
        f"{len(validation)} samples for validation",
        formats=account.formats,
    )
    record = DataRecord(
        fingerprint="stream",
        files={
            source.path: sources.outline(source, sources.list_files(source, hub=recipe.hub, offline=recipe.offline))
            for source in (*data.train, *data.validation)
        },
        account=account.to_json(),
        sides={},
        stop_ids=sorted(base.chat.stop_ids),
        thinking=stream.thinking,
        samples=None,
        mean_tokens=mean_tokens,
        mean_trained=mean_trained,
    )
    return feed, validation, record


def _validation(base: Base, recipe: Recipe) -> list[Sample]:
    data = recipe.data
    if recipe.train.eval_strategy == "no":
        return []
    own = bool(data.validation)
    account = Account()
    found: list[Sample] = []
    for read in Stream(base, recipe, data.validation or data.train, account).read(Place(), rounds=1):
        if own or read.side == "validation":
            found.append(read.sample)
        if len(found) == VALIDATION_SAMPLES or account.read >= VALIDATION_SEARCH:
            break
    return found
