"""Tokenised samples on disk: Arrow, memory-mapped, any sample in constant time and no more memory than is read.

One folder a data set: `samples.arrow` (record batches of `BATCH` samples), `train.npy`, `validation.npy`, `test.npy` (indices into
it), `lengths.npy` and `trained.npy` (tokens of a sample's tree, and those with weight), `prepared.json` (account, fingerprints).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tunedock.data.conversation import Example, from_json, to_json
from tunedock.data.sample import Sample, Segment

BATCH = 1024

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
    ]
)


@dataclass(frozen=True, slots=True)
class Stored:
    """A sample with what it was made from. `index` is the row's number in reading order, from 0."""

    sample: Sample
    index: int
    example: Example
    cut_tokens: int
    has_stop: bool


class SampleWriter:
    """Writes `samples.arrow` a batch at a time."""

    def __init__(self, path: Path) -> None:
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._sink, SCHEMA)
        self._rows: list[dict[str, Any]] = []

    def add(self, stored: Stored) -> None:
        segments = stored.sample.segments
        self._rows.append(
            {
                "row_id": stored.sample.row_id,
                "index": stored.index,
                "example": json.dumps(to_json(stored.example), ensure_ascii=False),
                "tokens": np.concatenate([s.tokens_T for s in segments]),
                "weights": np.concatenate([s.weights_T for s in segments]),
                "lengths": [len(s.tokens_T) for s in segments],
                "parents": [s.parent for s in segments],
                "cut_tokens": stored.cut_tokens,
                "has_stop": stored.has_stop,
            }
        )
        if len(self._rows) == BATCH:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_batch(pa.RecordBatch.from_pylist(self._rows, schema=SCHEMA))
            self._rows = []

    def close(self) -> None:
        self._flush()
        self._writer.close()
        self._sink.close()


class SampleStore(Sequence[Sample]):
    """The samples of one side of the split, read from the memory map when asked for."""

    def __init__(self, folder: Path, indices: NDArray[np.int64]) -> None:
        self._file = pa.ipc.open_file(pa.memory_map(str(folder / "samples.arrow")))
        self.indices = indices
        self.lengths: NDArray[np.int64] = np.load(folder / "lengths.npy", mmap_mode="r", allow_pickle=False)[indices]
        """Tokens of each sample."""
        self.trained: NDArray[np.int64] = np.load(folder / "trained.npy", mmap_mode="r", allow_pickle=False)[indices]
        """Tokens of each sample that carry weight."""

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> Sample:  # type: ignore[override]
        return self.stored(i).sample

    def stored(self, i: int) -> Stored:
        """The i-th sample of this side with what it was made from."""
        batch, offset = divmod(int(self.indices[i]), BATCH)
        row = self._file.get_batch(batch).slice(offset, 1)
        column = {name: row.column(name) for name in SCHEMA.names}
        tokens = column["tokens"].values.to_numpy()[_span(column["tokens"])]
        weights = column["weights"].values.to_numpy()[_span(column["weights"])]
        ends = np.cumsum(column["lengths"][0].as_py())
        parents = column["parents"][0].as_py()
        segments = tuple(
            Segment(tokens[end - length : end], weights[end - length : end], parent)
            for end, length, parent in zip(ends, column["lengths"][0].as_py(), parents, strict=True)
        )
        return Stored(
            sample=Sample(column["row_id"][0].as_py(), segments),
            index=column["index"][0].as_py(),
            example=from_json(json.loads(column["example"][0].as_py())),
            cut_tokens=column["cut_tokens"][0].as_py(),
            has_stop=column["has_stop"][0].as_py(),
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


def _span(column: pa.ListArray) -> slice:
    """Where the one list of a sliced column stands among the values of its batch."""
    return slice(column.offsets[0].as_py(), column.offsets[1].as_py())
