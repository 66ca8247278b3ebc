"""What an alias stood for, replayed from notes; what a canary is; and who is in it."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunedock.errors import RecipeError
from tunedock.registry.canary import is_in, parse_percent, place_of
from tunedock.registry.history import Canary, Note, Standing, behind, canary_tag, note_tag, notes, standing


def promoted(*versions: str) -> list[Note]:
    before: list[str | None] = [None, *versions]
    return [Note(at, "promote", old, new) for at, (old, new) in enumerate(zip(before, versions, strict=False))]


def back(before: str, to: str) -> Note:
    return Note(99, "rollback", before, to)


@pytest.mark.parametrize(
    ("current", "past", "wanted"),
    [
        ("3", promoted("1", "2", "3"), ["2", "1"]),
        ("2", [*promoted("1", "2", "3"), back("3", "2")], ["1"]),
        ("1", [*promoted("1", "2", "3"), back("3", "2"), back("2", "1")], []),
        # Two at once roll back the same version: one step, not two.
        ("2", [*promoted("1", "2", "3"), back("3", "2"), back("3", "2")], ["1"]),
        # Two at once promote: both read 1.
        ("3", [*promoted("1"), Note(1, "promote", "1", "2"), Note(2, "promote", "1", "3")], ["1", "2"]),
        # Died between the note and the move.
        ("2", promoted("1", "2", "3"), ["1"]),
        # Moved by other means: what stood there before is what a rollback goes to.
        ("7", promoted("1", "2"), ["2", "1"]),
        ("2", [*promoted("1"), Note(5, "promote", "7", "2")], ["7", "1"]),
        ("4", [], []),
        (None, promoted("1", "2"), ["2", "1"]),
        ("3", [Note(0, "canary", "1", "2", 10.0), *promoted("1", "3")], ["1"]),
    ],
)
def test_what_a_rollback_goes_to(current: str | None, past: Sequence[Note], wanted: list[str]) -> None:
    assert behind(current, past) == wanted


@given(st.lists(st.sampled_from("12345"), min_size=1, max_size=12), st.integers(0, 6))
def test_rolling_back_goes_back_and_never_forward(versions: list[str], times: int) -> None:
    past, current, seen = promoted(*versions), versions[-1], {versions[-1]}
    for _ in range(times):
        to = next(iter(behind(current, past)), None)
        if to is None:
            break
        assert to not in seen, "a version that was rolled back from is not gone back to"
        past, current = [*past, back(current, to)], to
        seen.add(to)


def test_notes_are_read_from_tags_and_nonsense_is_passed_over() -> None:
    key, value = note_tag("production", Note(5, "promote", "1", "2", by="ada"))
    other, more = note_tag("production", Note(7, "rollback", "2", "1"))
    tags = {
        other: more,
        key: value,
        "tunedock.history.production.x": "[",
        "tunedock.history.production.9-a": "{}",
        "a": "b",
    }
    assert [(note.act, note.before, note.to) for note in notes("production", tags)] == [
        ("promote", "1", "2"),
        ("rollback", "2", "1"),
    ]
    assert notes("prod", tags) == []
    long = "a" * 255
    assert len(note_tag(long, Note(5, "promote", "1", "2"))[0]) <= 250
    assert notes(long, dict([note_tag(long, Note(5, "promote", "1", "2"))]))


def test_a_canary_counts_only_beside_the_version_it_was_begun_beside() -> None:
    tags = dict([canary_tag("production", Canary("4", 10.0), "3")])
    assert standing("production", {"production": "3"}, tags) == Standing("3", Canary("4", 10.0))
    assert standing("production", {"production": "2"}, tags) == Standing("2")
    assert standing("production", {"production": "4"}, tags) == Standing("4")
    assert standing("production", {}, tags) == Standing(None)


@pytest.mark.parametrize(
    "value",
    ["", "[", "[]", "null", '{"version": 4}', "[" * 100_000, *(
        json.dumps({"version": "4", "percent": share, "beside": "3"}) for share in (0, -1, 100, 1e9, True, "10", None, float("nan"))
    )],
)  # fmt: skip
def test_a_canary_that_makes_no_sense_is_none(value: str) -> None:
    assert standing("production", {"production": "3"}, {"tunedock.canary.production": value}) == Standing("3")


# -- who is in a canary ----------------------------------------------------------------------------------------------------

SUBJECTS = [f"subject-{number}@example.org" for number in range(20_000)]


@given(st.text(max_size=40), st.text(max_size=40), st.floats(0, 100), st.floats(0, 100))
@settings(deadline=None, max_examples=60)
def test_whoever_is_in_stays_in_while_the_share_grows(subject: str, model: str, one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert is_in(subject, model, high) or not is_in(subject, model, low)
    assert not is_in(subject, model, 0) and is_in(subject, model, 100)
    assert place_of(subject, model) == place_of(subject, model)


@given(st.sampled_from([1.0, 5.0, 10.0, 25.0, 50.0, 90.0]), st.text(max_size=20))
@settings(deadline=None, max_examples=12)
def test_the_share_is_what_was_asked_for(percent: float, model: str) -> None:
    """Of 20,000 subjects, within 1.5 points: over four standard deviations at 50 %."""
    share = sum(is_in(subject, model, percent) for subject in SUBJECTS) / len(SUBJECTS) * 100
    assert abs(share - percent) < 1.5


def test_models_have_canaries_of_their_own() -> None:
    """The same people are not the first everywhere."""
    both = sum(is_in(subject, "a", 10) and is_in(subject, "b", 10) for subject in SUBJECTS)
    assert both / len(SUBJECTS) == pytest.approx(0.01, abs=0.005)


def test_shares_as_they_are_written() -> None:
    assert [parse_percent(text) for text in ("10%", "10", "0.5%", "0", " 12.25 % ")] == [10, 10, 0.5, 0, 12.25]
    for text in ("100%", "-1", "ten", "10.123", "1e1", "", "٣%", "150"):
        with pytest.raises(RecipeError, match="no share of a canary"):
            parse_percent(text)
