"""Tokenised samples on disk: Arrow, memory-mapped, any sample in constant time and no more memory than is read.

One folder a data set: `samples.arrow` (record batches of a few hundred samples), `train.npy`, `validation.npy`, `test.npy`
(indices into it), `lengths.npy` and `trained.npy` (tokens of a sample's tree, and those with weight),
`prepared.json` (account, fingerprints).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tunedock.data.conversation import Example, from_json, to_json
from tunedock.data.sample import Sample, Segment

SCHEMA = pa.schema(
    [
        ("row_id", pa.string()),
        ("index", pa.int64()),
        ("example", pa.string()),
        ("tokens", pa.list_(pa.int32())),
        ("weights", pa.list_(pa.float32())),
        ("lengths", pa.list_(pa.int32())),
        ("parents", pa.list_(pa.int32())),
        ("cut_tokens", pa.int32()),
        ("has_stop", pa.bool_()),
        ("margin", pa.float64()),
        ("wanted", pa.bool_()),
    ]
)


BATCHES_OPEN = 1024
"""Batches whose views are kept, a few ten thousand bytes each; the tokens themselves stay in the memory map."""

_JSON = json.JSONEncoder(ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class Stored:
    """A sample with what it was made from. `index` is the row's number in reading order, from 0."""

    sample: Sample
    index: int
    example: Example
    cut_tokens: int
    has_stop: bool


def batch_of(stored: Sequence[Stored]) -> pa.RecordBatch:
    """A record batch of samples, its columns made whole: Arrow takes long over values one by one."""
    segments = [one.sample.segments for one in stored]
    flat = [segment for some in segments for segment in some]
    by_token = _offsets([sum(len(segment.tokens_T) for segment in some) for some in segments])
    by_segment = _offsets([len(some) for some in segments])
    columns = [
        pa.array([one.sample.row_id for one in stored], pa.string()),
        pa.array([one.index for one in stored], pa.int64()),
        pa.array([_JSON.encode(to_json(one.example)) for one in stored], pa.string()),
        pa.ListArray.from_arrays(by_token, _joined([segment.tokens_T for segment in flat], np.int32)),
        pa.ListArray.from_arrays(by_token, _joined([segment.weights_T for segment in flat], np.float32)),
        pa.ListArray.from_arrays(by_segment, np.asarray([len(segment.tokens_T) for segment in flat], np.int32)),
        pa.ListArray.from_arrays(by_segment, np.asarray([segment.parent for segment in flat], np.int32)),
        pa.array([one.cut_tokens for one in stored], pa.int32()),
        pa.array([one.has_stop for one in stored], pa.bool_()),
        pa.array([one.sample.margin for one in stored], pa.float64()),
        pa.array([one.sample.wanted for one in stored], pa.bool_()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def _offsets(lengths: Sequence[int]) -> NDArray[np.int32]:
    return np.cumsum([0, *lengths], dtype=np.int32)


def _joined(parts: Sequence[NDArray[Any]], dtype: type[np.generic]) -> NDArray[Any]:
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.zeros(0, dtype)


class SampleWriter:
    """Writes `samples.arrow` a batch at a time."""

    def __init__(self, path: Path) -> None:
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._sink, SCHEMA)

    def write(self, batch: pa.RecordBatch) -> None:
        if batch.num_rows:
            self._writer.write_batch(batch)

    def close(self) -> None:
        self._writer.close()
        self._sink.close()


class _Batch:
    """Views of a record batch's tokens in the memory map: slicing them copies nothing, and makes no Arrow object."""

    __slots__ = ("by_segment", "by_token", "lengths", "margins", "parents", "row_ids", "tokens", "wanted", "weights")

    def __init__(self, batch: pa.RecordBatch) -> None:
        tokens, segments = batch.column("tokens"), batch.column("lengths")
        self.row_ids = batch.column("row_id")
        self.margins: NDArray[np.float64] = batch.column("margin").to_numpy()
        self.wanted: list[bool | None] = batch.column("wanted").to_pylist()
        self.tokens: NDArray[np.int32] = tokens.values.to_numpy()
        self.weights: NDArray[np.float32] = batch.column("weights").values.to_numpy()
        self.by_token: list[int] = tokens.offsets.to_pylist()
        self.lengths: list[int] = segments.values.to_pylist()
        self.parents: list[int] = batch.column("parents").values.to_pylist()
        self.by_segment: list[int] = segments.offsets.to_pylist()

    def sample(self, number: int) -> Sample:
        at = self.by_token[number]
        segments = []
        for segment in range(self.by_segment[number], self.by_segment[number + 1]):
            end = at + self.lengths[segment]
            segments.append(Segment(self.tokens[at:end], self.weights[at:end], self.parents[segment]))
            at = end
        row_id, margin, wanted = self.row_ids[number].as_py(), float(self.margins[number]), self.wanted[number]
        return Sample(row_id, tuple(segments), margin, wanted=wanted)


class SampleStore(Sequence[Sample]):
    """The samples of one side of the split, read from the memory map when asked for."""

    def __init__(self, folder: Path, indices: NDArray[np.int64]) -> None:
        self._file = pa.ipc.open_file(pa.memory_map(str(folder / "samples.arrow")))
        self._starts = np.cumsum([0, *(self._file.get_batch(i).num_rows for i in range(self._file.num_record_batches))])
        """Number of the first sample of each batch."""
        self._batch = lru_cache(maxsize=BATCHES_OPEN)(lambda number: _Batch(self._file.get_batch(number)))
        self.indices = indices
        self.lengths: NDArray[np.int64] = np.load(folder / "lengths.npy", mmap_mode="r", allow_pickle=False)[indices]
        """Tokens of each sample."""
        self.trained: NDArray[np.int64] = np.load(folder / "trained.npy", mmap_mode="r", allow_pickle=False)[indices]
        """Tokens of each sample that carry weight."""

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> Sample:  # type: ignore[override]
        """The i-th sample of this side: its tokens alone, which is all that training reads."""
        batch, number = self._place(i)
        return self._batch(batch).sample(number)

    def stored(self, i: int) -> Stored:
        """The i-th sample of this side with what it was made from."""
        batch, number = self._place(i)
        columns = self._file.get_batch(batch)
        return Stored(
            sample=self._batch(batch).sample(number),
            index=columns.column("index")[number].as_py(),
            example=from_json(json.loads(columns.column("example")[number].as_py())),
            cut_tokens=columns.column("cut_tokens")[number].as_py(),
            has_stop=columns.column("has_stop")[number].as_py(),
        )

    def row_indices(self) -> set[int]:
        """The rows, by number in reading order, this side's samples were made from."""
        column = np.concatenate(
            [self._file.get_batch(i).column("index").to_numpy() for i in range(self._file.num_record_batches)]
            or [np.zeros(0)]
        )
        return set(column[self.indices].tolist())

    def samples(self, indices: Iterable[int]) -> list[Sample]:
        return [self[int(i)] for i in indices]

    def _place(self, i: int) -> tuple[int, int]:
        """(batch, number in it) of this side's i-th sample."""
        index = int(self.indices[i])
        batch = int(np.searchsorted(self._starts, index, side="right")) - 1
        return batch, index - int(self._starts[batch])
