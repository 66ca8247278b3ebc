"""What was measured on this machine is kept, and a file that is gone, damaged or another machine's is no figure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tunedock.plan.speed import Speeds, operations


def test_a_figure_is_kept_for_its_kind(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "speeds.json"
    assert Speeds(file).get("cpu, float32") is None
    Speeds(file).put("cpu, float32", 0.25)
    Speeds(file).put("cpu, bfloat16", 1.5)
    assert Speeds(file).get("cpu, float32") == 0.25
    assert Speeds(file).get("cpu, bfloat16") == 1.5
    assert [path.name for path in file.parent.iterdir()] == ["speeds.json"]


@pytest.mark.parametrize("content", ["", "{", "[1]", '"x"', '{"cpu": 1}', "\x00"])
def test_a_damaged_file_is_no_figure_and_is_mended(tmp_path: Path, content: str) -> None:
    file = tmp_path / "speeds.json"
    file.write_text(content, encoding="utf-8")
    assert Speeds(file).get("cpu, float32") is None
    Speeds(file).put("cpu, float32", 0.25)
    assert Speeds(file).get("cpu, float32") == 0.25


@pytest.mark.parametrize("value", ["fast", 0, -1.0, None, [1.0]])
def test_a_value_that_is_no_speed_is_none(tmp_path: Path, value: object) -> None:
    file = tmp_path / "speeds.json"
    Speeds(file).put("cpu, float32", 0.25)
    key = next(iter(json.loads(file.read_text(encoding="utf-8"))))
    file.write_text(json.dumps({key: value}), encoding="utf-8")
    assert Speeds(file).get("cpu, float32") is None


def test_another_machines_figure_is_none_of_ours(tmp_path: Path) -> None:
    file = tmp_path / "speeds.json"
    Speeds(file).put("cpu, float32", 0.25)
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace(" cores;", "0 cores;"), encoding="utf-8")
    assert Speeds(file).get("cpu, float32") is None


def test_a_folder_that_cannot_be_written_costs_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    Speeds(tmp_path / "file" / "speeds.json").put("cpu, float32", 0.25)


def test_operations_are_six_or_four_a_parameter_and_token() -> None:
    """6 N D: Kaplan et al. (arXiv 2001.08361), equation 2.2; two of the six are the weights' own gradients."""
    assert operations(100, 10, 7, 3, full=True) == 6 * (100 * 7 + 10 * 3)
    assert operations(100, 10, 7, 3, full=False) == 4 * (100 * 7 + 10 * 3)
