"""The same files are the same bytes on any machine, whoever packs them, and all rows are counted."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunedock.data.pack import pack
from tunedock.data.sources import fingerprint, list_files, read_rows
from tunedock.errors import DataError, DiskError
from tunedock.events import Emitter
from tunedock.image.data_cache import bring
from tunedock.recipe import data_images
from tunedock.recipe.data_images import LAYER, Packed, Packing
from tunedock.recipe.schema import Source


def packed(source: Path, folder: Path) -> tuple[Packed, bytes]:
    folder.mkdir()
    found = pack(Packing(source=Source(path=str(source)), folder=str(folder)), Emitter(io.StringIO()))
    return found, (folder / LAYER).read_bytes()


names = st.text("abcdefé中 -_.'", min_size=1, max_size=12).filter(lambda name: name[0] not in ".")


@given(
    files=st.dictionaries(
        st.tuples(st.sampled_from(["", "train/", "a/b/"]), names).map(lambda parts: f"{parts[0]}{parts[1]}.txt"),
        st.binary(min_size=1, max_size=600),
        min_size=1,
        max_size=5,
    )
)
def test_what_is_packed_depends_on_names_and_bytes_alone(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes]
) -> None:
    made = []
    for order, mode, time in ((list(files), 0o600, 1), (list(reversed(files)), 0o755, 10**9)):
        place = tmp_path_factory.mktemp("packed")
        for name in order:
            path = place / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(files[name])
            path.chmod(mode)
            os.utime(path, (time, time))
        made.append(packed(place / "data", place / "out"))
    assert made[0] == made[1]
    found, layer = made[0]
    assert found.revision == f"sha256:{hashlib.sha256(layer).hexdigest()}"
    assert (found.bytes, set(found.files)) == (sum(map(len, files.values())), set(files))
    with tarfile.open(fileobj=io.BytesIO(layer)) as archive:
        members = {member.name: member for member in archive}
        assert {name: archive.extractfile(f"data/{name}").read() for name in files} == files  # type: ignore[union-attr]
    assert {(m.mtime, m.uid, m.gid, m.uname) for m in members.values()} == {(0, 0, 0, "")}


def test_rows_are_counted_by_file_and_those_that_cannot_be_read_too(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.jsonl").write_text('{"text": "a"}\nno json\n{"text": "b"}\n')
    (tmp_path / "data/test.csv").write_text("text\nc\n")
    (tmp_path / "data/README.md").write_text("about it")
    found, _ = packed(tmp_path / "data", tmp_path / "out")
    assert found.files == {"test.csv": 1, "train.jsonl": 3}
    assert found.unreadable == 1


def test_a_file_alone_goes_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    found, _ = packed(tmp_path / "rows.jsonl", tmp_path / "out")
    assert found.files == {"rows.jsonl": 1}


def test_what_cannot_be_packed(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="the folder is empty"):
        packed(tmp_path / "empty", tmp_path / "1")
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError):
        packed(tmp_path / "rows.parquet", tmp_path / "2")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / LAYER).mkdir()
    with pytest.raises(DiskError, match="cannot write"):
        pack(
            Packing(source=Source(path=str(tmp_path / "rows.jsonl")), folder=str(tmp_path / "3")),
            Emitter(io.StringIO()),
        )


SHA = "sha256:" + "ab" * 32


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the revision SHA in an empty cache."""
    monkeypatch.setattr(data_images, "CACHE", tmp_path / "images")
    folder = data_images.folder_of(SHA)
    folder.mkdir(parents=True)
    return folder


def ids(**settings: str) -> list[str]:
    return [row.row_id for row in read_rows(Source(path="image://data:1", revision=SHA, **settings))]


def test_files_of_an_image_are_told_apart_by_split_where_their_names_tell_it(here: Path) -> None:
    (here / "train.jsonl").write_text('{"text": "a"}\n')
    (here / "test.jsonl").write_text('{"text": "b"}\n{"text": "c"}\n')
    assert ids() == ["train.jsonl:1"]
    assert ids(split="test") == ["test.jsonl:1", "test.jsonl:2"]
    with pytest.raises(DataError, match="no file belongs to the split `validation`"):
        ids(split="validation")


def test_and_stand_all_for_it_where_they_tell_none(here: Path) -> None:
    (here / "deep").mkdir()
    (here / "deep/b-00000-of-00002.jsonl").write_text('{"text": "a"}\n')
    (here / "deep/b-00001-of-00002.jsonl").write_text('{"text": "b"}\n')
    assert ids() == ["deep/b-00000-of-00002.jsonl:1", "deep/b-00001-of-00002.jsonl:1"]


def test_its_fingerprint_is_that_of_the_folder(here: Path) -> None:
    (here / "train.jsonl").write_text('{"text": "a"}\n')
    image, folder = Source(path="image://data:1", revision=SHA), Source(path=str(here))
    assert fingerprint(image, list_files(image)) == fingerprint(folder, list_files(folder))


def test_an_image_that_was_not_brought(here: Path) -> None:
    with pytest.raises(DataError, match="it is not known which content") as caught:
        list_files(Source(path="image://data:1"))
    assert caught.value.where == "image://data:1"
    with pytest.raises(DataError, match="is not on this machine"):
        list_files(Source(path="image://data:1", revision="sha256:" + "cd" * 32))
    assert bring("data:1", SHA, offline=True, tell=lambda *_: None) == SHA
