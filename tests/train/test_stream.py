"""Streaming: every training row once a round, validation rows never trained, a restored stream that goes on exactly."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from families import save_tiny
from tunedock import pipeline
from tunedock.data import sources
from tunedock.data.account import Account
from tunedock.errors import DataError
from tunedock.events import Emitter
from tunedock.model.session import find_base
from tunedock.recipe.schema import Recipe, Source, Split
from tunedock.train.stream import Place, Stream, StreamFeed, streamed_data

ROWS = 90


def recipe(folder: Path, *, pretrain: bool = False, broken: int = 0) -> Recipe:
    save_tiny("qwen3", folder / "base")
    for part in (0, 1):
        lines = [
            json.dumps({"text": f"{n} " + "hours in a day " * (n % 40)})
            if pretrain
            else json.dumps({"prompt": f"question {n}", "response": f"answer {n}"})
            for n in range(part * ROWS // 2, (part + 1) * ROWS // 2)
        ]
        (folder / f"part{part}.jsonl").write_text("\n".join(lines + ["{broken"] * broken))
    (folder / "recipe.yaml").write_text(
        f"model: ./base\nobjective: {'pretrain' if pretrain else 'sft'}\n"
        "data: {train: [part0.jsonl, part1.jsonl], streaming: true, max_length: 48, shuffle_buffer: 20}\n"
        "train: {max_steps: 50, batch_size: 7}\n"
    )
    return pipeline.resolve_recipe([folder / "recipe.yaml"]).recipe


def feed_of(made: Recipe) -> StreamFeed:
    stream = Stream(find_base(made), made, made.data.train, Account())
    return StreamFeed(stream, batch_size=7, buffer=made.data.shuffle_buffer, seed=1)


@pytest.mark.parametrize("pretrain", [False, True])
def test_it_goes_on_exactly_from_any_step(tmp_path: Path, pretrain: bool) -> None:
    made = recipe(tmp_path, pretrain=pretrain)
    straight = feed_of(made)
    steps, states = [], []
    for number in range(40):
        states.append(straight.state(number))
        steps.append([(s.row_id, s.tokens) for s in straight.step(number)])
    for start in (0, 1, 2, 5, 13, 24, 39):
        resumed = feed_of(made)
        resumed.restore(json.loads(json.dumps(states[start])), {})
        for number in range(start, 40):
            assert [(s.row_id, s.tokens) for s in resumed.step(number)] == steps[number], (start, number)


def test_a_step_that_was_drawn_and_thrown_away_is_done_again(tmp_path: Path) -> None:
    made = recipe(tmp_path)
    straight = feed_of(made)
    for number in range(8):
        drawn = [(s.row_id, s.tokens) for s in straight.step(number)]
        resumed = feed_of(made)
        resumed.step(0)  # as `streamed_data` does, to look at the first samples
        resumed.restore(json.loads(json.dumps(straight.state(number))), {})
        assert [(s.row_id, s.tokens) for s in resumed.step(number)] == drawn, number


def test_each_round_brings_every_training_row_once_and_no_other(tmp_path: Path) -> None:
    made = recipe(tmp_path)
    everything = list(Stream(find_base(made), made, made.data.train, Account()).read(Place(), rounds=1))
    assert len(everything) == ROWS
    training = {read.sample.row_id for read in everything if read.side == "train"}
    assert 0 < len(training) < ROWS
    feed = feed_of(made)
    seen: Counter[str] = Counter()
    number = 0
    while sum(seen.values()) < 2 * len(training):
        seen.update(s.row_id for s in feed.step(number))
        number += 1
    extra = sum(seen.values()) - 2 * len(training)  # the last step may reach into the third round
    assert set(seen) == training
    assert sum(count - 2 for count in seen.values()) == extra


def test_validation_is_the_other_side_of_the_same_hash(tmp_path: Path) -> None:
    made = recipe(tmp_path)
    feed, validation, about = streamed_data(find_base(made), made, 7, Emitter(None))
    assert validation
    trained = {s.row_id for n in range(30) for s in feed.step(n)}
    assert not trained & {s.row_id for s in validation}
    assert about.samples is None
    assert feed.account.read == feed.account.kept == ROWS  # each row once, however many rounds


def test_a_stream_without_a_training_row_is_an_error_not_an_endless_search(tmp_path: Path) -> None:
    made = recipe(tmp_path)
    none = made.data.model_copy(update={"split": Split(train=0.0, validation=1.0, test=0.0)})
    with pytest.raises(DataError, match="training side"):
        feed_of(made.model_copy(update={"data": none})).step(0)


def test_too_many_dropped_rows_end_the_stream(tmp_path: Path) -> None:
    made = recipe(tmp_path, broken=3)
    feed = feed_of(made)
    with pytest.raises(DataError, match="max_dropped"):
        for number in range(60):
            feed.step(number)


def test_resuming_opens_no_file_before_the_one_it_stands_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten files of 40 rows: to go on in the ninth, at most 40 of 340 rows are passed over, and that is told."""
    save_tiny("qwen3", tmp_path / "base")
    (tmp_path / "shards").mkdir()
    for part in range(10):
        lines = [
            json.dumps({"prompt": f"question {n}", "response": f"answer {n}"}) for n in range(40 * part, 40 * part + 40)
        ]
        (tmp_path / "shards" / f"{part:02}.jsonl").write_text("\n".join(lines))
    (tmp_path / "recipe.yaml").write_text(
        "model: ./base\ndata: {train: shards, streaming: true, max_length: 48, shuffle_buffer: 12, "
        "split: {train: 1, validation: 0, test: 0}}\ntrain: {max_steps: 50, batch_size: 3, eval_strategy: 'no'}\n"
    )
    made = pipeline.resolve_recipe([tmp_path / "recipe.yaml"]).recipe
    straight = StreamFeed(Stream(find_base(made), made, made.data.train, Account()), batch_size=10, buffer=12, seed=1)
    steps, states = [], []
    for number in range(70):
        states.append(json.loads(json.dumps(straight.state(number))))
        steps.append([s.row_id for s in straight.step(number)])
    opened: list[str] = []
    read = sources.read_records

    def reading(path: str, kind: Any) -> Any:
        opened.append(Path(path).name)
        return read(path, kind)

    monkeypatch.setattr(sources, "read_records", reading)
    for start in (30, 34, 58, 65):  # the last two in the second round
        opened.clear()
        resumed = StreamFeed(
            Stream(find_base(made), made, made.data.train, Account()), batch_size=10, buffer=12, seed=1
        )
        resumed.restore(states[start], {})
        stream = io.StringIO()
        resumed.tell_place(Emitter(stream))
        note = json.loads(stream.getvalue())
        assert 0 <= note["data"]["passed_over"] <= 40
        assert f"{note['data']['passed_over']} rows of that file were passed over" in note["message"]
        format_of = {"00.jsonl", "01.jsonl", "02.jsonl"}  # which a hundred rows tell
        assert {name for name in opened if name < f"{note['data']['file']:02}.jsonl"} <= format_of
        for number in range(start, 70):
            assert [s.row_id for s in resumed.step(number)] == steps[number], (start, number)


def test_a_limit_on_samples_holds_from_the_middle_of_a_source_too(tmp_path: Path) -> None:
    for part in range(3):
        (tmp_path / f"{part}.jsonl").write_text("\n".join(json.dumps({"text": f"{part} {n}"}) for n in range(4)))
    source = Source(path=str(tmp_path), num_samples=10)
    whole = list(sources.read_rows(source))
    assert [row.shard for row in whole[3:5]] == [sources.Shard(0, 0), sources.Shard(1, 4)]
    assert list(sources.read_rows(source, shard=sources.Shard(1, 4))) == whole[4:]
    assert list(sources.read_rows(source, shard=sources.Shard(2, 8))) == whole[8:]
