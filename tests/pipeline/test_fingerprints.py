"""Content as a hash: read again only when a file has changed."""

from __future__ import annotations

import os

import pytest

from tunedock.errors import DataError
from tunedock.pipeline.fingerprints import Fingerprints, sizes


def test_a_file_is_its_content(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("a\n")
    first = Fingerprints({}).of(str(file))
    assert first is not None and len(first) == 16
    os.utime(file, (1, 1))
    assert Fingerprints({}).of(str(file)) == first
    file.write_text("b\n")
    assert Fingerprints({}).of(str(file)) != first


def test_what_has_not_changed_is_not_read_again(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("a\n")
    known = {}
    first = Fingerprints(known).of(str(file))
    known[str(file)][2] = "f" * 64
    assert Fingerprints(known).of(str(file)) == "f" * 16 != first
    os.utime(file, (1, 1))
    assert Fingerprints(known).of(str(file)) == first


def test_a_folder_is_its_names_and_contents(tmp_path):
    folder = tmp_path / "model"
    (folder / "deep").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "deep" / "x").write_text("x")
    first = Fingerprints({}).of(str(folder))
    (folder / ".cache").mkdir()
    (folder / ".cache" / "y").write_text("y")
    assert Fingerprints({}).of(str(folder)) == first
    assert sizes(folder) == {"config.json": 2, "deep/x": 1}
    (folder / "deep" / "x").rename(folder / "deep" / "z")
    second = Fingerprints({}).of(str(folder))
    moved = tmp_path / "elsewhere"
    folder.rename(moved)
    assert Fingerprints({}).of(str(moved)) == second != first


def test_a_glob_is_the_files_it_finds(tmp_path):
    (tmp_path / "a.jsonl").write_text("a")
    first = Fingerprints({}).of(str(tmp_path / "*.jsonl"))
    (tmp_path / "b.jsonl").write_text("b")
    assert Fingerprints({}).of(str(tmp_path / "*.jsonl")) != first
    assert Fingerprints({}).of(str(tmp_path / "*.csv")) is None


@pytest.mark.parametrize("path", ["Qwen/Qwen3-8B", "https://host/rows.jsonl", "stage:sft"])
def test_what_is_elsewhere_has_none(path):
    assert Fingerprints({}).of(path) is None


def test_what_cannot_be_read_is_told(tmp_path):
    folder = tmp_path / "loop"
    folder.mkdir()
    (folder / "self").symlink_to("self")
    assert Fingerprints({}).of(str(folder)) is not None
    file = tmp_path / "rows.jsonl"
    file.write_text("a")
    file.chmod(0)
    if not os.access(file, os.R_OK):
        with pytest.raises(DataError, match="cannot be read"):
            Fingerprints({}).of(str(file))
