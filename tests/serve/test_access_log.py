"""The access log: whole lines, in order, whatever the disk does."""

from __future__ import annotations

import json
import os
from pathlib import Path

import httpx
import pytest

from serving_bed import serving
from tunedock.serve.records import MOST_WAITING, AccessLog


def test_lines_are_whole_and_in_order(tmp_path: Path) -> None:
    log = AccessLog(tmp_path / "deep" / "log.jsonl")
    for number in range(500):
        log.write({"request": number, "path": "/v1/\u2028\n"})
    log.close()
    lines = (tmp_path / "deep" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["request"] for line in lines] == list(range(500))


def test_a_line_the_disk_cut_off_does_not_take_the_next_one_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, cut = os.write, [3]

    def some(descriptor: int, data: bytes) -> int:
        return write(descriptor, data[: cut.pop()] if cut else data)

    monkeypatch.setattr(os, "write", some)
    log = AccessLog(tmp_path / "log.jsonl")
    log.write({"request": 1})
    log.write({"request": 2})
    log.close()
    first, second = (tmp_path / "log.jsonl").read_text().splitlines()
    assert len(first) == 3 and json.loads(second) == {"request": 2}
    assert log.lost == 1


def test_a_path_that_cannot_be_is_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    log = AccessLog(tmp_path / "file" / "log.jsonl")
    log.close()
    assert log.lost == 0 and "the access log cannot be written" in capsys.readouterr().err


def test_what_is_too_much_is_lost_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = AccessLog(tmp_path / "log.jsonl")
    log.close()  # nobody writes any more
    for number in range(MOST_WAITING + 3):
        log.write({"request": number})
    assert log.lost == 3
    assert capsys.readouterr().err.count("behind by more") == 1


def test_what_a_gateway_prints_is_on_its_commands_standard_error(tmp_path: Path) -> None:
    with serving(tmp_path, "--open", model="none=http://127.0.0.1:9/v1") as gateway:
        httpx.get(f"{gateway.url}/v1/models")
    assert any(line.startswith("{") and json.loads(line)["path"] == "/v1/models" for line in gateway.said), gateway.said
    (tmp_path / "file").write_text("")
    log = str(tmp_path / "file" / "log.jsonl")
    with serving(tmp_path, "--open", "--access-log", log, model="none=http://127.0.0.1:9/v1") as gateway:
        pass
    assert any("the access log cannot be written" in line for line in gateway.said), gateway.said
