from __future__ import annotations

import io
import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunedock.cli.text import one_line, print_json, printable


@pytest.mark.parametrize(
    ("hostile", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07text", "text"),
        ("\x1b]52;c;ZXZpbA==\x1b\\text", "text"),
        ("\x1b]8;;http://evil\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x9b2Jgone", "gone"),
        ("\x1bP$q\x1b\\x", "x"),
        ("\x1bc\x1b(Bx", "x"),
        ("\x1b", ""),
        ("a\x1b[", "a"),
        ("over\rwritten\b\b", "overwritten"),
        ("abc\u202edcba", "abcdcba"),
        ("\ud800x", "x"),
        ("caf\udce9\udc1b", "caf\\xe9"),
        ("tab\tand\nnewline", "tab\tand\nnewline"),
        ("[red]markup[/red] 你好 👩‍💻", "[red]markup[/red] 你好 👩‍💻"),
    ],
)
def test_text_from_outside_cannot_steer_the_terminal(hostile, shown):
    assert printable(hostile) == shown


@given(st.text(alphabet=st.one_of(st.sampled_from("\x1b[]0;m\x07\x9b\\P"), st.characters())))
def test_no_control_character_is_left_whatever_comes(text):
    left = printable(text)
    assert not any(ord(c) < 32 and c not in "\n\t" for c in left)
    assert not any(0x7F <= ord(c) < 0xA0 or 0xD800 <= ord(c) < 0xE000 for c in left)
    assert printable(left) == left
    left.encode("utf-8")


def test_one_line_folds_and_cuts():
    assert one_line("a\n  b\t\x1b[1mc") == "a b c"
    assert one_line("abcdef", 4) == "abc…"
    assert one_line("abcd", 4) == "abcd"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "gbk"])
def test_json_is_whole_in_every_encoding_and_safe_on_a_terminal(monkeypatch, encoding):
    value = {"text": "你好\u009b2J\x7f\ud800 👍\x1b[0m"}
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    print_json(value)
    raw = written.getvalue().decode(encoding)
    assert json.loads(raw) == value
    assert not any((ord(c) < 32 and c != "\n") or 0x7F <= ord(c) < 0xA0 for c in raw)
