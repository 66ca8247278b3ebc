from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tunedock.data.conversation import (
    Conversation,
    Document,
    Labelled,
    Message,
    Preference,
    ToolCall,
    from_json,
    to_json,
)
from tunedock.data.sample import Sample, Segment, single
from tunedock.data.store import SampleStore, SampleWriter, Stored, batch_of

BATCH = 40

TALK = Conversation((Message("user", "你好"), Message("assistant", "hi", weight=0.0, reasoning="think")))


@pytest.mark.parametrize(
    "example",
    [
        TALK,
        Conversation(
            (
                Message("assistant", "", tool_calls=(ToolCall("f", {"x": [1, {"y": None}]}, "1"),)),
                Message("tool", "3", tool_call_id="1", name="f"),
            ),
            tools=({"type": "function"},),
        ),
        Preference((Message("user", "q"),), (Message("assistant", "a"),), (Message("assistant", "b"),)),
        Labelled((Message("user", "q"),), (Message("assistant", "a"),), False),
        Document("text"),
    ],
)
def test_examples_survive_json(example: Conversation) -> None:
    assert from_json(to_json(example)) == example


def test_any_sample_comes_back_across_batches(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    written = []
    writer = SampleWriter(tmp_path / "samples.arrow")
    for n in range(BATCH + 7):
        root = Segment(draw.integers(0, 99, 1 + n % 5).astype(np.int32), np.zeros(1 + n % 5, np.float32))
        leaf = Segment(draw.integers(0, 99, 2).astype(np.int32), np.asarray([1.0, 0.5], np.float32), 0)
        sample = (
            Sample(f"f:{n}", (root, leaf), wanted=(True, False, None)[n % 3])
            if n % 2
            else single(f"f:{n}", root.tokens_T, root.weights_T)
        )
        written.append(Stored(sample, n, TALK, n % 3, bool(n % 2)))
    for batch in (written[:BATCH], [], written[BATCH:]):
        writer.write(batch_of(batch))
    writer.close()
    np.save(tmp_path / "lengths.npy", np.asarray([s.sample.tokens for s in written]))
    np.save(tmp_path / "trained.npy", np.zeros(len(written), np.int64))
    order = np.asarray([BATCH + 3, 0, BATCH - 1, BATCH, 5])
    store = SampleStore(tmp_path, order)
    assert len(store) == 5
    assert store.row_indices() == set(order.tolist())
    for place, index in enumerate(order):
        read, meant = store.stored(place), written[index]
        assert (read.index, read.example, read.cut_tokens, read.has_stop) == (
            meant.index,
            meant.example,
            meant.cut_tokens,
            meant.has_stop,
        )
        assert read.sample.wanted is meant.sample.wanted
        for a, b in zip(read.sample.segments, meant.sample.segments, strict=True):
            assert a.parent == b.parent
            np.testing.assert_array_equal(a.tokens_T, b.tokens_T)
            np.testing.assert_array_equal(a.weights_T, b.weights_T)
