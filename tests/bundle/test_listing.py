"""What the lists of a bundle may say: hostile ones are refused by name."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunedock.bundle.listing import MOST_FILES, Facts, Image, Older, is_part, pieces, read_list, write_list, wrong_path
from tunedock.errors import CheckError

SUM = "0a" * 32


@pytest.mark.parametrize(
    "path",
    [
        "content/a.txt", "content/data/数据 1.jsonl", "images/" + "0" * 64, "wheels/a-1.0+cpu-py3-none-any.whl", "content/.hidden",
        "content/model/model-00001-of-00002.safetensors", "FILES", "bundle.json", "install.sh", "content/a (1)/b=c,d@e~f",
    ],
)  # fmt: skip
def test_paths_that_may_stand(path: str) -> None:
    assert wrong_path(path) is None
    assert read_list(f"{SUM}  {path}\n", "FILES") == {path: SUM}


@pytest.mark.parametrize(
    "path",
    [
        "../etc/passwd", "/etc/passwd", "content/../../x", "content/..", "content/./a", "content//a", "content/", "content", "~/x",
        "other/a",
        "SHA256SUMS",
        "content/a\\b", "content/-rf", "content/a\x1b[2J", "content/a\u202eb", "content/a ", "content/a.", "content/a:b",
        "content/a*", "content/$(id)", "content/`id`", "content/a'b", 'content/a"b', "content/a;b", "content/a|b", "content/\udce9",
        "content/" + "a" * 400,
    ],
)  # fmt: skip
def test_paths_that_may_not(path: str) -> None:
    assert wrong_path(path)
    with pytest.raises(CheckError, match="line 1"):
        read_list(f"{SUM}  {path}\n", "FILES")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"{SUM}  content/a", "last line is cut"),
        (f"{SUM} content/a\n", "no sum and path"),
        (f"{SUM} *content/a\n", "no sum and path"),
        (f"\\{SUM}  content/a\n", "no sum and path"),
        (f"{SUM.upper()}  content/a\n", "no sum and path"),
        ("\n", "no sum and path"),
        (f"{SUM}  content/a\r\n", "characters"),
        (f"{SUM}  content/a\n" * 2, "a second time"),
        (f"{SUM}  content/a\n{SUM}  content/A\n", "a second time"),
        (f"{SUM}  content/\u00e9\n{SUM}  content/e\u0301\n", "a second time|characters"),
        (f"{SUM}  content/a\n{SUM}  content/a/b\n", "as a file and as a folder"),
        (f"{SUM}  content/a/b\n{SUM}  content/A\n", "as a file and as a folder"),
        ("\n" * (MOST_FILES + 2), "more than 100,000"),
    ],
)
def test_lists_that_are_refused(text: str, said: str) -> None:
    with pytest.raises(CheckError, match=said) as caught:
        read_list(text, "FILES")
    assert caught.value.where == "FILES"


@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        found = read_list(text, "FILES")
    except CheckError:
        return
    assert write_list(found) == "".join(sorted(text.splitlines(keepends=True), key=lambda line: line[66:]))


def test_parts() -> None:
    sums = {"content/a.part0000": SUM, "content/a.part0001": SUM, "content/a.part0003": SUM, "content/b": SUM}
    assert pieces(sums, "content/a") == ["content/a.part0000", "content/a.part0001"]
    assert pieces(sums, "content/b") == ["content/b"]
    assert pieces(sums, "content/c") == []
    assert is_part("content/a.part0003")
    assert not is_part("content/a.part")


FACTS = Facts(
    "b", "2026-01-01T00:00:00Z", "0.1.0", 1, 2, [Image(["a:1"], "sha256:00", ["sha256:11"])], [Older("o", SUM)]
)


def test_facts_go_through_json() -> None:
    assert Facts.from_json(FACTS.to_json()) == FACTS


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", "null", "nonsense", '{"format": 1}', '{"format": 99}',
        json.dumps(asdict(FACTS) | {"bytes": -1}),
        json.dumps(asdict(FACTS) | {"bytes": True}),
        json.dumps(asdict(FACTS) | {"name": 3}),
        json.dumps(asdict(FACTS) | {"images": [{"names": "x"}]}),
        json.dumps(asdict(FACTS) | {"name": "b\nsigned by release.pub"}),
        json.dumps(asdict(FACTS) | {"name": "b\x1b[31m"}),
        json.dumps(asdict(FACTS) | {"images": [{"names": "abc", "id": "x", "layers": []}]}),
        json.dumps(asdict(FACTS) | {"older": [1]}),
        json.dumps(asdict(FACTS) | {"older": [{"name": 5, "sums": SUM}]}),
        "[" * 200_000, '{"a":' * 200_000,
        json.dumps(asdict(FACTS) | {"more": 1}),
    ],
)  # fmt: skip
def test_facts_that_are_none(text: str) -> None:
    with pytest.raises(CheckError) as caught:
        Facts.from_json(text)
    assert caught.value.where == "bundle.json"
