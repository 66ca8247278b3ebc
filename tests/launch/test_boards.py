"""Dashboards: what is committed is what is described, in both languages, and stands on the page as it should."""

from __future__ import annotations

import json
from itertools import combinations
from typing import Any

import pytest

from tunedock.launch.boards import write
from tunedock.launch.boards.shape import COLUMNS, as_json

NAMES = sorted(write.texts())


def board(name: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((write.FOLDER / name).read_text(encoding="utf-8"))
    return value


@pytest.mark.parametrize("name", NAMES)
def test_it_is_as_described(name: str) -> None:
    assert (write.FOLDER / name).read_text(encoding="utf-8") == write.texts()[name], "run `make boards`"


def test_there_are_no_others() -> None:
    assert sorted(path.name for path in write.FOLDER.glob("*.json")) == NAMES


def test_every_text_is_translated_and_no_other() -> None:
    said: set[str] = set()

    def say(text: str) -> str:
        said.add(text)
        return text

    for one in write.BOARDS.values():
        as_json(one, say)
    assert said == write.titles().keys()
    assert all(chinese.strip() == chinese != "" for chinese in write.titles().values())


@pytest.mark.parametrize("name", NAMES)
def test_panels_stand_side_by_side(name: str) -> None:
    found = board(name)
    assert len({panel["id"] for panel in found["panels"]}) == len(found["panels"])
    places = [panel["gridPos"] for panel in found["panels"]]
    assert all(place["x"] + place["w"] <= COLUMNS for place in places)
    for one, other in combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below, (one, other)


def test_boards_in_two_languages_ask_the_same() -> None:
    assert len({board(name)["uid"] for name in NAMES}) == len(NAMES)
    for english in (name for name in NAMES if ".zh." not in name):
        first, second = (board(name) for name in (english, english.replace(".json", ".zh.json")))
        assert [asked(panel) for panel in first["panels"]] == [asked(panel) for panel in second["panels"]]


def asked(panel: dict[str, Any]) -> list[str]:
    return [target["expr"] for target in panel.get("targets", ())]
