"""Promoting, rolling back and the history of names, in a real registry."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry_bed import PASSWORD, USER, log_in, upload
from tunedock.errors import EngineError, RecipeError
from tunedock.image.reference import parse
from tunedock.image.registry import Registry
from tunedock.image.versions import Former, behind, history, is_history, promote, roll_back


def test_promoted_twice_and_rolled_back_twice(guarded_registry: str, docker_config: Path) -> None:
    log_in(docker_config, guarded_registry)
    target = parse(f"{guarded_registry}/support-bot:production")
    one, two, three = (upload(guarded_registry, "support-bot", tag, tag, (USER, PASSWORD)) for tag in ("1", "2", "3"))
    with Registry(guarded_registry) as registry:
        assert promote(registry, target, "1").before is None
        assert promote(registry, target, "2").before == one
        assert promote(registry, target, three).before == two
        assert not promote(registry, target, "3").changed  # and leaves no trace
        began = time.monotonic()
        back = roll_back(registry, target)
        took_s = time.monotonic() - began
        assert (back.before, back.digest) == (three, two)
        assert registry.digest("support-bot", "production") == two
        assert took_s < 2
        assert roll_back(registry, target).digest == one  # not forward to what was just found bad
        with pytest.raises(EngineError, match="nothing to go back to") as caught:
            roll_back(registry, target)
        assert "--to" in str(caught.value.hint)
        past = history("production", registry.tags("support-bot"))
    assert [(former.digest, former.how) for former in past] == [
        (one, "was"),
        (two, "was"),
        (three, "back"),
        (two, "back"),
    ]


def test_another_machine_goes_back_to_a_named_digest(open_registry: str, docker_config: Path) -> None:
    target = parse(f"{open_registry}/named/bot:production")
    digests = [upload(open_registry, "named/bot", tag, tag) for tag in "abc"]
    with Registry(open_registry) as registry:
        for digest in digests:
            promote(registry, target, digest)
    with Registry(open_registry) as other:
        assert roll_back(other, target, to=digests[0][:15]).digest == digests[0]
        with pytest.raises(EngineError, match="is no digest in the history"):
            roll_back(other, target, to="ffffffffff")
        with pytest.raises(EngineError, match="is no digest"):
            roll_back(other, target, to="sha256:")


def test_a_name_that_another_tool_moved_is_gone_back_to(open_registry: str, docker_config: Path) -> None:
    target = parse(f"{open_registry}/moved/bot:production")
    with Registry(open_registry) as registry:
        upload(open_registry, "moved/bot", "production", "first")
        by_hand = upload(open_registry, "moved/bot", "production", "second")
        promote(registry, target, upload(open_registry, "moved/bot", "3", "third"))
        assert roll_back(registry, target).digest == by_hand


def test_a_death_between_the_note_and_the_move_loses_nothing(open_registry: str, docker_config: Path) -> None:
    target = parse(f"{open_registry}/died/bot:production")
    one, two = (upload(open_registry, "died/bot", tag, tag) for tag in "ab")
    with Registry(open_registry) as registry:
        promote(registry, target, one)
        note = Former(one, datetime.now(UTC), "was").tag("production")
        registry.put("died/bot", note, registry.manifest("died/bot", one))  # and no move
        promote(registry, target, two)
        assert roll_back(registry, target).digest == one


@pytest.mark.parametrize("name", ["bot", "bot:" + "x" * 33, "bot:production.was-20260102T030405678Z-" + "a" * 64])
def test_names_that_do_not_move(name: str, open_registry: str, docker_config: Path) -> None:
    with Registry(open_registry) as registry, pytest.raises(RecipeError):
        promote(registry, parse(f"{open_registry}/{name}"), "1")


def test_rolling_back_what_is_not_there(open_registry: str, docker_config: Path) -> None:
    with Registry(open_registry) as registry, pytest.raises(EngineError, match="it has no `none/bot:production`"):
        roll_back(registry, parse(f"{open_registry}/none/bot:production"))


def test_a_tag_holds_the_longest_name() -> None:
    tag = Former("sha256:" + "a" * 64, datetime.now(UTC), "back").tag("x" * 32)
    assert len(tag) <= 128
    assert is_history(tag)


def test_tags_of_others_are_no_history() -> None:
    tail = "a" * 64
    others = ["20261301T000000000Z", "20260101T00000000Z"]
    assert history("prod", [*(f"prod.was-{when}-{tail}" for when in others), "prod"]) == []
    assert history("prod", [f"prod.gone-20260101T000000000Z-{tail}", f"other.was-20260101T000000000Z-{tail}"]) == []
    assert len(history("prod", [f"prod.was-20260101T000000000Z-{tail}"])) == 1


@given(st.lists(st.one_of(st.integers(0, 5), st.just("back")), max_size=30))
def test_any_history_replays(moves: list[int | str]) -> None:
    """Promotions and rollbacks in any order, against a plain stack; written as tags, and read back from them in any order."""
    now = datetime(2026, 1, 1, tzinfo=UTC)
    current, stack, tags = 0, [], []
    for move in moves:
        before = current
        if move == "back":
            able = [version for version in reversed(stack) if version != current]
            assert behind(_digest(current), history("p", sorted(tags))) == [_digest(version) for version in able]
            if not able:
                continue
            while stack.pop() != able[0]:
                pass
            current = able[0]
        elif move == current:
            continue
        else:
            stack.append(current)
            current = int(move)
        now += timedelta(milliseconds=1)
        tags.append(Former(_digest(before), now, "back" if move == "back" else "was").tag("p"))
    assert behind(_digest(current), history("p", sorted(tags, reverse=True))) == [
        _digest(version) for version in reversed(stack) if version != current
    ]


def _digest(version: int) -> str:
    return f"sha256:{version:064x}"
