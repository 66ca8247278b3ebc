"""Which files a source stands for, the ids of their rows, and their fingerprint."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import datasets
import fsspec
import huggingface_hub
import pytest

from tunedock.data.sources import RawRow, fingerprint, list_files, read_rows
from tunedock.errors import DataError, DependencyError
from tunedock.recipe.schema import Source

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write(path: Path, *texts: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def rows(source: Source, *, offline: bool = False) -> list[tuple[str, str]]:
    return [(row.row_id, row.value["text"]) for row in read_rows(source, offline=offline)]


def test_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "one", "two")
    assert list_files(Source(path=str(path))) == [str(path)]
    assert rows(Source(path=str(path))) == [("a.jsonl:1", "one"), ("a.jsonl:2", "two")]
    assert rows(Source(path=f"file://{path}")) == rows(Source(path=str(path)))


def test_num_samples_counts_broken_rows_and_reads_no_further(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    whole = gzip.compress(b'{"text": "one"}\nbroken\n' + b'{"text": "more"}\n' * 300_000)
    path.write_bytes(whole[: len(whole) // 2])
    found = list(read_rows(Source(path=str(path), num_samples=3)))
    assert [row.problem and row.problem[0] for row in found] == [None, "broken_json", None]
    with pytest.raises(DataError, match="cut off"):
        list(read_rows(Source(path=str(path))))


def test_a_folder_is_sorted_and_leaves_out_what_is_no_data(tmp_path: Path) -> None:
    write(tmp_path / "b" / "x.jsonl", "b")
    write(tmp_path / "a.jsonl", "a")
    write(tmp_path / ".hidden.jsonl", "no")
    write(tmp_path / ".cache" / "c.jsonl", "no")
    write(tmp_path / "b" / "dataset_info.json", "no")
    (tmp_path / "README.md").write_text("# About")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert rows(Source(path=str(tmp_path))) == [("a.jsonl:1", "a"), ("b/x.jsonl:1", "b")]


def test_a_folder_of_documents(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# About")
    (tmp_path / "a.txt").write_text("")
    assert rows(Source(path=str(tmp_path))) == [("README.md:1", "# About"), ("a.txt:1", "")]


def test_globs(tmp_path: Path) -> None:
    write(tmp_path / "one" / "a.jsonl", "a")
    write(tmp_path / "two" / "deep" / "b.jsonl", "b")
    write(tmp_path / "two" / "c.json", "c")
    assert rows(Source(path=f"{tmp_path}/**/*.jsonl")) == [("one/a.jsonl:1", "a"), ("two/deep/b.jsonl:1", "b")]
    assert rows(Source(path=f"{tmp_path}/t*/*")) == [("c.json:#1", "c")]
    with pytest.raises(DataError, match="no file fits"):
        list_files(Source(path=f"{tmp_path}/*.csv"))


def test_a_name_with_brackets_is_a_file_before_it_is_a_pattern(tmp_path: Path) -> None:
    path = write(tmp_path / "rows[1].jsonl", "a")
    assert rows(Source(path=str(path))) == [("rows[1].jsonl:1", "a")]


def test_object_stores() -> None:
    store = fsspec.filesystem("memory")
    for name in ("b.jsonl", "sub/a.jsonl", ".hidden.jsonl", "note.md"):
        store.pipe(f"/lake/{name}", json.dumps({"text": name}).encode())
    wanted = [("b.jsonl:1", "b.jsonl"), ("sub/a.jsonl:1", "sub/a.jsonl")]
    assert rows(Source(path="memory://lake"), offline=True) == wanted
    assert rows(Source(path="memory://lake/**/*.jsonl")) == wanted
    assert rows(Source(path="memory://lake/b.jsonl")) == wanted[:1]
    for missing in ("memory://lake/none.jsonl", "memory://none", "memory://lake/*.csv"):
        with pytest.raises(DataError) as caught:
            list_files(Source(path=missing))
        assert caught.value.where == missing


def test_a_missing_file_says_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "work" / "data" / "a.jsonl", "a")
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(DataError) as caught:
        list_files(Source(path=str(tmp_path / "recipes" / "data" / "a.jsonl")))
    assert caught.value.where == str(tmp_path / "recipes" / "data" / "a.jsonl")
    assert "`data/a.jsonl` exists in the working directory" in str(caught.value.hint)
    with pytest.raises(DataError) as caught:
        list_files(Source(path=str(tmp_path / "nowhere.jsonl")))
    assert "owner/name" in str(caught.value.hint)


def test_files_that_cannot_be_sources(tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").write_bytes(b"x")
    (tmp_path / "b.jsonl").write_bytes(b"")
    (tmp_path / "none").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.xlsx").write_bytes(b"x")
    for name, message in (
        ("a.xlsx", "`.xlsx` is no known extension"),
        ("b.jsonl", "the file is empty"),
        ("none", "the folder is empty"),
        ("other", r"no file here has a known extension \(found .xlsx\)"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            list_files(Source(path=str(tmp_path / name)))
        assert caught.value.where == str(tmp_path / name)
    with pytest.raises(DataError) as caught:
        list_files(Source(path=str(tmp_path / "a.xlsx")))
    assert ".parquet" in str(caught.value.hint)


# Folders saved by `datasets`


def test_a_folder_saved_to_disk(tmp_path: Path) -> None:
    data = datasets.Dataset.from_dict({"text": ["a", "b", "c"]})
    data.save_to_disk(str(tmp_path / "one"), num_shards=2)
    (tmp_path / "one" / "cache-123.arrow").write_bytes(b"a stray file that state.json does not list")
    assert rows(Source(path=str(tmp_path / "one"))) == [
        ("data-00000-of-00002.arrow:#1", "a"),
        ("data-00000-of-00002.arrow:#2", "b"),
        ("data-00001-of-00002.arrow:#1", "c"),
    ]
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(str(tmp_path / "two"))
    assert [text for _, text in rows(Source(path=str(tmp_path / "two"), split="test"))] == ["b"]
    with pytest.raises(DataError, match="no split `dev`") as caught:
        list_files(Source(path=str(tmp_path / "two"), split="dev"))
    assert "test, train" in str(caught.value.hint)


@pytest.mark.parametrize(
    "state", ["{}", "[", '{"_data_files": [{"filename": "../secret.arrow"}]}', '{"_data_files": [3]}']
)
def test_a_state_that_lies_is_refused(tmp_path: Path, state: str) -> None:
    (tmp_path / "secret.arrow").write_bytes(b"secret")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "state.json").write_text(state)
    with pytest.raises(DataError):
        list_files(Source(path=str(tmp_path / "set")))


# Hubs


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The snapshot folder of `owner/name` in a hub cache of its own."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "datasets--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").write_text("# About")
    return snapshot


def test_a_hub_data_set_from_the_cache(cached: Path) -> None:
    write(cached / "data" / "train-00000-of-00002.jsonl", "a")
    write(cached / "data" / "train-00001-of-00002.jsonl", "b")
    write(cached / "data" / "test-00000-of-00001.jsonl", "t")
    assert rows(Source(path="owner/name"), offline=True) == [
        ("train-00000-of-00002.jsonl:1", "a"),
        ("train-00001-of-00002.jsonl:1", "b"),
    ]
    assert rows(Source(path="owner/name", split="test"), offline=True) == [("test-00000-of-00001.jsonl:1", "t")]


def test_a_hub_data_set_that_is_not_there(cached: Path) -> None:
    with pytest.raises(DataError, match="hub cache does not hold"):
        list_files(Source(path="owner/other"), offline=True)
    with pytest.raises(DataError, match="hub cache does not hold"):
        list_files(Source(path="owner/name", revision="v2"), offline=True)


def test_modelscope_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "modelscope", None)
    with pytest.raises(DependencyError, match=r"tunedock\[modelscope\]"):
        list_files(Source(path="owner/name"), hub="modelscope")


def test_a_relative_path_with_an_extension_is_a_missing_file_and_no_hub_id() -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        list_files(Source(path="data/missing.jsonl"), offline=True)


# Fingerprints


def test_the_fingerprint_follows_content_and_names_but_not_the_place(tmp_path: Path) -> None:
    def mark(folder: str) -> str:
        source = Source(path=str(tmp_path / folder))
        return fingerprint(source, list_files(source))

    for folder in ("one", "two"):
        write(tmp_path / folder / "a.jsonl", "x")
        write(tmp_path / folder / "b.jsonl", "y")
    first = mark("one")
    assert first == mark("two")
    (tmp_path / "two" / "b.jsonl").rename(tmp_path / "two" / "c.jsonl")
    assert mark("two") != first
    write(tmp_path / "one" / "b.jsonl", "z")
    changed = mark("one")
    assert changed != first
    write(tmp_path / "one" / "a.jsonl", "z")
    write(tmp_path / "one" / "b.jsonl", "x")
    assert mark("one") not in (first, changed)


def test_raw_rows_are_plain_values(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "one")
    assert next(read_rows(Source(path=str(path)))) == RawRow("a.jsonl:1", {"text": "one"}, None)
