"""The pages under docs: links lead somewhere, commands are commands, both languages show the same, and the index has them all."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from tunedock.cli.app import app

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
WRITTEN = [page for page in PAGES if page.parent.name in ("guides", "concepts", "docs")]
ENGLISH = [page for page in WRITTEN if page.parent.name in ("guides", "concepts") and not page.name.endswith(".zh.md")]


def named(page: Path) -> str:
    return str(page.relative_to(DOCS))


def anchors(page: Path) -> set[str]:
    """The ids GitHub gives a page's headings: lower case, without punctuation, hyphens for spaces."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page: Path) -> list[str]:
    return re.findall(r"^\$ (tunedock .*)$", page.read_text(encoding="utf-8"), re.MULTILINE)


def blocks(page: Path) -> list[tuple[str, str]]:
    """Blocks that name their language; drawings name none, and their words are translated."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(kind, content) for kind, content in found if kind in ("console", "json")]


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_its_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


@pytest.mark.parametrize("page", WRITTEN, ids=named)
def test_the_tests_it_names_are_there(page: Path) -> None:
    for path in re.findall(r"`(tests/[^`\s]+)`", page.read_text(encoding="utf-8")):
        assert (DOCS.parent / path).exists(), path


@pytest.mark.parametrize("page", [page for page in WRITTEN if commands(page)], ids=named)
def test_its_commands_are_commands(page: Path) -> None:
    for line in commands(page):
        _, *words = shlex.split(re.sub(r"\s+# .*", "", line))
        command = typer.main.get_command(app)
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        if "--help" not in words:
            command.make_context("tunedock", words)


@pytest.mark.parametrize("page", ENGLISH, ids=named)
def test_there_is_one_in_chinese_that_shows_the_same(page: Path) -> None:
    chinese = page.with_name(f"{page.stem}.zh.md")
    assert blocks(page) == blocks(chinese)
    assert f"]({chinese.name})" in page.read_text(encoding="utf-8").split("\n## ")[0]
    assert f"]({page.name})" in chinese.read_text(encoding="utf-8").split("\n## ")[0]


def test_the_index_has_every_page() -> None:
    english, chinese = ((DOCS / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md"))
    for page in PAGES:
        if page.name.startswith("README"):
            continue
        translated = page.name.endswith(".zh.md")
        assert f"]({named(page)})" in (chinese if translated else english), page
