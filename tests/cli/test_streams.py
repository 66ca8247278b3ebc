"""Terminals and pipes that are not UTF-8, with real processes: nothing is lost and nothing fails."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunedock.cli.streams import SPELT, prepare_streams, print_document

LOCALES = {
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "ascii": {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    "latin-1": {"PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"},
    "cp936": {"PYTHONIOENCODING": "cp936", "PYTHONUTF8": "0"},
}
CODECS = {"C": "ascii"}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"messages": []}\n')
    (tmp_path / "r.yaml").write_text(
        "model: some/model\ndata: {train: ./rows.jsonl, system: 你好 👍}\n", encoding="utf-8"
    )
    (tmp_path / "lf.yaml").write_text(
        "model_name_or_path: some/model\nstage: sft\ndo_train: true\nfinetuning_type: lora\ndataset: rows\n"
        "default_system: 你好\ndataset_dir: .\n",
        encoding="utf-8",
    )
    (tmp_path / "dataset_info.json").write_text('{"rows": {"file_name": "rows.jsonl", "formatting": "sharegpt"}}')
    return tmp_path


def tunedock(folder: Path, locale: str, *arguments: str, **options):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHON"))}
    return subprocess.run(
        [sys.executable, "-m", "tunedock", *arguments],
        cwd=folder, env=environment | LOCALES[locale], capture_output=True, timeout=120, **options,
    )  # fmt: skip


@pytest.mark.parametrize("locale", LOCALES)
def test_text_is_spelt_out_where_it_cannot_be_written(folder, locale):
    done = tunedock(folder, locale, "recipe", "show", "r.yaml")
    assert done.returncode == 0, done.stderr
    out = done.stdout.decode(CODECS.get(locale, locale))
    assert "\\U0001f44d" in out
    assert ("你好" if locale == "cp936" else "\\u4f60\\u597d") in out


@pytest.mark.parametrize("locale", LOCALES)
def test_json_is_valid_and_the_same(folder, locale):
    done = tunedock(folder, locale, "recipe", "show", "r.yaml", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
    assert json.loads(done.stdout)["recipe"]["data"]["system"] == "你好 👍"


@pytest.mark.parametrize("locale", ["C", "cp936"])
def test_errors_are_said(folder, locale):
    (folder / "wrong.yaml").write_text("train: {👍: 1}\n", encoding="utf-8")
    done = tunedock(folder, locale, "recipe", "show", "r.yaml", "wrong.yaml")
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr
    assert b"error: wrong.yaml:1: " in done.stderr
    assert b"\\U0001f44d" in done.stderr


@pytest.mark.parametrize("locale", ["C", "cp936"])
def test_a_recipe_piped_to_a_file_is_utf8_as_it_will_be_read(folder, locale):
    done = tunedock(folder, locale, "recipe", "import", "lf.yaml")
    assert done.returncode == 0, done.stderr
    assert "你好" in done.stdout.decode("utf-8")


def test_a_name_that_is_no_text_is_shown_byte_by_byte(folder):
    done = subprocess.run(
        [sys.executable, "-m", "tunedock", "recipe", "show", b"caf\xe9.yaml"],
        cwd=folder,
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert b"error: caf\\xe9.yaml: there is no such file" in done.stderr


@given(st.text(alphabet=st.one_of(st.sampled_from([*SPELT, "a", "你"]), st.characters())))
def test_every_text_can_be_written_and_what_fits_is_left_alone(text):
    written = io.TextIOWrapper(io.BytesIO(), encoding="ascii", newline="")
    before, sys.stdout = sys.stdout, written
    try:
        prepare_streams()
        print(text, end="")
        written.flush()
    finally:
        sys.stdout = before
    shown = written.buffer.getvalue().decode("ascii")
    for sign, spelt in SPELT.items():
        text = text.replace(sign, spelt)
    assert shown == text.encode("ascii", "backslashreplace").decode("ascii")


def test_a_document_is_utf8_in_a_pipe(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="gbk"))
    print("before")
    print_document("system: 你好\n")
    assert written.getvalue().decode("utf-8") == "before\nsystem: 你好\n"


@pytest.mark.long
@pytest.mark.parametrize("locale", ["C", "cp936"])
def test_the_real_worker_and_a_chat_in_chinese(folder, locale):
    demo = Path(__file__).parents[2] / "examples" / "demo" / "base-config"
    rows = [
        {"messages": [{"role": "user", "content": f"你好 {n}"}, {"role": "assistant", "content": "好≥"}]}
        for n in range(8)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "r.yaml").write_text(
        f"model: {{path: {demo}, init: random}}\nadapter: full\noffline: true\n"
        "data: {train: ./rows.jsonl, cache_dir: ./cache}\ntrain: {max_steps: 1, output_dir: runs/one}\n"
    )
    done = tunedock(folder, locale, "data", "show", "r.yaml", "--row", "1")
    assert done.returncode == 0, done.stderr
    assert b"[[" in done.stdout
    assert tunedock(folder, locale, "train", "r.yaml").returncode == 0
    turn = "你好\n".encode("utf-8" if locale == "C" else "gbk")
    done = tunedock(folder, locale, "chat", "one", input=turn)
    assert (done.returncode, b"Traceback" in done.stderr) == (0, False), done.stderr
    done = tunedock(folder, locale, "chat", "one", input=b"\xff\xff\n")
    assert done.returncode == 3
    assert b"error: standard input: a line is not" in done.stderr
