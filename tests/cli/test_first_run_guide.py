"""The guide to a first run: every command in it exists, in both languages, and so does every page it points to."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from tunedock.cli.app import app
from tunedock.cli.init import FILES

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "docs" / "guides" / name for name in ("first-run.md", "first-run.zh.md")]


def commands(page: Path) -> list[str]:
    return re.findall(r"^\$ (tunedock .*)$", page.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_one(page):
    text = page.read_text(encoding="utf-8")
    inline = [line for line in re.findall(r"`(?:eval \"\$\()?(tunedock [a-z][^`)]*)", text) if "RUN" not in line]
    assert len(commands(page)) >= 10
    for line in commands(page) + inline:
        _, *words = shlex.split(line)
        command = typer.main.get_command(app)
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        if words != ["--help"]:
            command.make_context("tunedock", words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_it_shows_and_points_to_is_there(page):
    text = page.read_text(encoding="utf-8")
    assert [line.removeprefix("library/") for line in re.findall(r"^library/\S+$", text, re.MULTILINE)] == list(FILES)
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (page.parent / target).is_file(), target


def test_both_languages_run_the_same():
    english, chinese = (re.findall(r"^```console\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S) for page in PAGES)
    assert english == chinese
