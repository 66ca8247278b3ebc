"""YAML as plain values with lines; hostile text ends in a RecipeError."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunedock.errors import RecipeError
from tunedock.recipe.document import MAX_BYTES, parse, read


def test_yaml_1_2_types() -> None:
    text = "on: local\nno: 'yes'\nlr: 1e-4\nhex: 0x10\nday: 2024-01-31\nnothing: ~\nflag: true\nlist: [1, a]\n"
    assert parse(text, "r.yaml").value == {
        "on": "local",
        "no": "yes",
        "lr": 1e-4,
        "hex": 16,
        "day": "2024-01-31",
        "nothing": None,
        "flag": True,
        "list": [1, "a"],
    }


def test_lines_are_those_of_the_keys() -> None:
    document = parse("a: 1\n\nb:\n  c:\n    - x: 1\n      y: 2\n", "r.yaml")
    assert document.lines[("b",)] == 3
    assert document.lines[("b", "c")] == 4
    assert document.lines[("b", "c", 0, "y")] == 6


BROKEN = {
    "tab": ("a:\n\tb: 1\n", "r.yaml:2:1", "spaces, not tabs"),
    "duplicate": ("a: 1\nb:\n  c: 1\n  c: 2\n", "r.yaml:4:3", "keep one"),
    "object tag": ("a: !!python/object/apply:os.system [id]\n", "r.yaml:1:4", "plain YAML"),
    "own tag": ("a: !secret x\n", "r.yaml:1:4", "plain YAML"),
    "binary": ("a: !!binary aGk=\n", "r.yaml:1:4", "plain YAML"),
    "unclosed": ("a: [1\nb: 2\n", "r.yaml:2", None),
    "two documents": ("a: 1\n---\nb: 2\n", "r.yaml:2:1", "one file holds one recipe"),
    "merge key": ("a: &a {x: 1}\nb:\n  <<: *a\n", "r.yaml:3:3", "overlays"),
    "key is a list": ("? [1, 2]\n: 3\n", "r.yaml:1:3", "quotes"),
    "key is a boolean": ("true: 3\n", "r.yaml:1:1", "quotes"),
    "self-reference": ("a: &a [*a]\n", "r.yaml:1", None),
    "at sign": ("a: @x\n", "r.yaml:1:4", "quotes"),
    "colon": ("a: b: c\n", "r.yaml:1", "quotes"),
    "control character": ("a: \x07\n", "r.yaml", None),
    "unknown alias": ("a: *nobody\n", "r.yaml:1", None),
    "too many digits": ("a: " + "9" * 5000, "r.yaml:1:4", "quotes"),
    "half a character pair": (r'a: "\ud800"', "r.yaml:1:4", None),
    "half a pair in a key": (r'"\udc00": 1', "r.yaml:1:1", None),
    "deep": ("a: " + "[" * 400 + "]" * 400, "r.yaml", None),
    "deeper than Python's stack": ("[" * 20_000, "r.yaml", None),
}


@pytest.mark.parametrize(("text", "where", "hint"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_yaml(text: str, where: str, hint: str | None) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(text, "r.yaml")
    assert str(caught.value.where).startswith(where)
    assert hint is None or hint in str(caught.value.hint)
    assert "Traceback" not in str(caught.value)


def test_alias_bomb_ends_at_once() -> None:
    levels = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 15))
    started = time.monotonic()
    with pytest.raises(RecipeError, match="aliases"):
        parse("a0: &a0 [x, x]\n" + levels, "r.yaml")
    assert time.monotonic() - started < 5


def test_json_is_read_with_its_escapes() -> None:
    assert parse(r'{"a\u00e9": "\ud83d\ude00 \u4e2d", "b": [1e-4, null]}', "r.json").value == {
        "aé": "😀 中",
        "b": [1e-4, None],
    }


def test_aliases_of_sane_size_are_read() -> None:
    assert parse("a: &x [1, 2]\nb: *x\n", "r.yaml").value == {"a": [1, 2], "b": [1, 2]}


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    cases = {
        "empty.yaml": (b"", "empty"),
        "comment.yaml": (b"# nothing\n", "empty"),
        "list.yaml": (b"- a\n", "list"),
        "text.yaml": (b"hello\n", "'hello'"),
        "latin.yaml": ("model: x\nname: é".encode("latin-1"), "not UTF-8"),
        "large.yaml": (b"#" * (MAX_BYTES + 1), "1 MiB"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RecipeError, match=message) as caught:
            read(tmp_path / name)
        assert name in str(caught.value.where)
    with pytest.raises(RecipeError, match="no such file") as caught:
        read(tmp_path / "nope.yaml")
    assert "empty.yaml" in str(caught.value.hint)
    with pytest.raises(RecipeError, match="folder"):
        read(tmp_path)
    with pytest.raises(RecipeError, match="null byte"):
        read(Path("\0"))


def test_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"\xef\xbb\xbfmodel: x\n")
    assert read(tmp_path / "r.yaml").value == {"model": "x"}


@given(st.text(alphabet=st.sampled_from(list("ab:-[]{}&*!|>'\"#%@`, \n\t?~019.<")), max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        value = parse(text, "r.yaml").value
    except RecipeError as error:
        assert error.where
        return
    assert isinstance(value, dict | list | str | int | float | bool | None)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet"])
def test_data_in_the_place_of_a_recipe_are_called_so(tmp_path, name):
    (tmp_path / name).write_bytes(b"PAR1\xff\n")
    with pytest.raises(RecipeError, match="file of data") as caught:
        read(tmp_path / name)
    assert f"data.train={tmp_path / name}" in str(caught.value.hint)
