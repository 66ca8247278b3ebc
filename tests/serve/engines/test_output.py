"""What another program prints: its last lines, its file, and what is never kept."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tunedock.serve.engines import output
from tunedock.serve.engines.output import Output


def printed(path: Path, *pieces: bytes, secret: str | None = None) -> Output:
    made = Output(path, secret=secret)
    write_end = os.dup(made.write_end)
    made.start()
    for piece in pieces:
        os.write(write_end, piece)
    os.close(write_end)
    made.join()
    return made


def test_lines_in_any_pieces(tmp_path: Path) -> None:
    made = printed(tmp_path / "log", b"load", b"ing\nCUDA out of", b" memory\n\n")
    assert made.last() == "CUDA out of memory"
    assert made.tail(8) == "loading\nCUDA out of memory"
    assert (tmp_path / "log").read_bytes() == b"loading\nCUDA out of memory\n\n"


def test_a_line_without_end_is_kept_in_pieces(tmp_path: Path) -> None:
    made = printed(tmp_path / "log", *[b"x" * 10_000] * 3)
    assert (tmp_path / "log").read_bytes().replace(b"\n", b"") == b"x" * 30_000
    assert made.last() == "x" * (30_000 % output.LONGEST_LINE)


def test_the_key_and_what_a_terminal_obeys_are_left_out(tmp_path: Path) -> None:
    made = printed(tmp_path / "log", b"key: s3cret\n\x1b]0;title\x07\x1b[31mred\xff\n", secret="s3cret")
    assert made.tail(2).splitlines()[0] == "key: ***"
    assert "\x1b" not in made.last() and "\x07" not in made.last() and "red" in made.last()
    assert b"s3cret" not in (tmp_path / "log").read_bytes()


def test_the_file_does_not_grow_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "LARGEST_BYTES", 1000)
    printed(tmp_path / "log", *[b"%0100d\n" % number for number in range(40)])
    assert {path.name for path in tmp_path.iterdir()} == {"log", "log.1"}
    assert all(path.stat().st_size <= 1200 for path in tmp_path.iterdir())
    assert (tmp_path / "log").read_bytes().rstrip().endswith(b"39")


def test_a_file_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    assert printed(tmp_path / "no" / "log", b"one\ntwo\n").last() == "two"
