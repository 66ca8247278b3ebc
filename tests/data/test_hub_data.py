"""The files of a split and a subset, by the names repositories use."""

from __future__ import annotations

import pytest

from tunedock.data.hub_data import pick, split_name
from tunedock.errors import DataError
from tunedock.recipe.schema import Source


def picked(*files: str, split: str = "train", subset: str | None = None) -> list[str]:
    return pick(files, Source(path="owner/name", split=split, subset=subset))


@pytest.mark.parametrize(
    ("file", "split"),
    [
        ("data/train-00000-of-00002.parquet", "train"),
        ("data/train-00000-of-00002-a1b2c3.parquet", "train"),
        ("data/train_sft-00000-of-00002.parquet", "train_sft"),
        ("train_01.jsonl.gz", "train"),
        ("train-2.jsonl", "train"),
        ("my_dev.jsonl", "dev"),
        ("test/part1.csv", "test"),
        ("strain.jsonl", ""),
        ("alpaca_data.json", ""),
    ],
)
def test_split_of_a_name(file: str, split: str) -> None:
    assert split_name(file) == split


def test_one_file_and_files_without_splits_are_train() -> None:
    assert picked("alpaca_data.json") == ["alpaca_data.json"]
    assert picked("a.jsonl", "b.jsonl") == ["a.jsonl", "b.jsonl"]


def test_splits_go_by_their_words() -> None:
    files = ("train.jsonl", "dev.jsonl", "eval.jsonl")
    assert picked(*files) == ["train.jsonl"]
    assert picked(*files, split="validation") == ["dev.jsonl"]
    assert picked(*files, split="test") == ["eval.jsonl"]


def test_an_exact_name_wins_and_a_choice_is_the_users() -> None:
    files = ("data/train_sft-00000-of-00001.parquet", "data/train_gen-00000-of-00001.parquet")
    assert picked(*files, split="train_gen") == [files[1]]
    with pytest.raises(DataError, match="several splits") as caught:
        picked(*files)
    assert "train_sft, train_gen" in str(caught.value.hint)


def test_subsets() -> None:
    files = ("main/train-00000-of-00001.parquet", "socratic/train-00000-of-00001.parquet", "main/test.parquet")
    assert picked(*files, subset="main") == [files[0]]
    with pytest.raises(DataError, match="several subsets") as caught:
        picked(*files)
    assert "main, socratic" in str(caught.value.hint)
    with pytest.raises(DataError, match="no file belongs to the subset `other`"):
        picked(*files, subset="other")


def test_a_split_that_is_not_there() -> None:
    with pytest.raises(DataError, match="no file belongs to the split `test`") as caught:
        picked("train.jsonl", "dev.jsonl", split="test")
    assert "train, dev" in str(caught.value.hint)
